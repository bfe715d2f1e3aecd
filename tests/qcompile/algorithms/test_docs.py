"""The algorithm that docs/algorithms.md shows how to write does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompile
from qcompile.algorithms import ALGORITHMS

PAGE = Path(__file__).parents[3] / "docs" / "algorithms.md"


def test_the_example_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setitem(ALGORITHMS, "quantile", "")
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), {"__name__": "example"})
    model, x = nn.Linear(64, 64, bias=False).eval(), torch.randn(2, 64)
    recipe = qcompile.load_recipe("fp8_gemm", ["calibration={algorithm: quantile, percent: 90}"])
    program = qcompile.quantize(model, (x,), recipe=recipe, calibration=[x], dtype=torch.float32, progress=False)
    scale = model.weight.detach().abs().flatten().sort().values[round(64 * 64 * 0.9) - 1] / 448
    torch.testing.assert_close(program.state_dict["weight_scale"], scale)
    recipe = qcompile.load_recipe("fp8_gemm", ["calibration={algorithm: quantile, power_of_two: true}"])
    program = qcompile.quantize(model, (x,), recipe=recipe, calibration=[x], dtype=torch.float32, progress=False)
    assert all(program.state_dict[name].frexp().mantissa == 0.5 for name in ("weight_scale", "input_scale"))


def test_the_page_names_every_algorithm_and_its_recipes_load() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in ALGORITHMS)
