"""A layer that a format does not fit is declined, whatever algorithm would have chosen its codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.report.program import ProgramReport

X = [torch.randn(32, 128, generator=torch.Generator().manual_seed(n)) for n in range(2)]


@pytest.mark.everyday(4)
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_weight_only", "int4_weight_only"])
@pytest.mark.parametrize("steps", ["gptq", "svdquant", "awq", "smoothquant", "hessian_mse"])
def test_the_rest_is_quantized(recipe: str, steps: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 17), nn.ReLU(), nn.Linear(17, 64)).eval()
    chosen = qcompile.load_recipe(recipe, [f"calibration=[{{algorithm: {steps}}}]"])
    program = qcompile.quantize(model, (X[0],), recipe=chosen, calibration=X, dtype=torch.float32, progress=False)
    report = ProgramReport.of(program)
    assert set(report.quantized) == {"0"} and report.unquantized["2"] == "linear"
    assert any(d.module == "2" and "the reduction axis has 17" in d.reason for d in report.declined)
    with torch.no_grad():
        want, got = model(X[0]), program.module()(X[0])
    assert 0 < (got - want).norm() < 0.3 * want.norm()
