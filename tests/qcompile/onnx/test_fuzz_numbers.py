"""Any numbers into exported files: ONNX Runtime, onnx.reference and the program agree on what is finite.

Values agree, too. Block scales are left to one case with infinities: at 2^127 a code of theirs can differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from torch import nn

import qcompile
from qcompile.onnx.execute import MatMul

SPECIAL = [np.nan, np.inf, -np.inf, 65504, -65504, 7e4, 1e30, -3e38, 1e-40, -1e-7, 6e-5, 0.0, -0.0, 4.0]
CASES = [
    pytest.param(recipe, dtype, marks=() if (recipe, dtype) == ("fp8", torch.float32) else (pytest.mark.slow,))
    for recipe in ("fp8", "fp8_gemm")
    for dtype in (torch.float32, torch.float16)
]
_MADE: dict[Any, Any] = {}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def exported(recipe: str, dtype: torch.dtype, folder: Any) -> tuple[Any, Any, Any]:
    """The program as a function, the same of the file in ONNX Runtime and in `onnx.reference`."""
    if (recipe, dtype) in _MADE:
        return _MADE[recipe, dtype]  # type: ignore[no-any-return]
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    program = qcompile.quantize(Mlp().eval(), (x,), recipe=recipe, calibration=[(x,)], dtype=dtype, progress=False)
    path = folder.mktemp("fuzz") / "m.onnx"
    qcompile.export_onnx(program, path, target="portable")
    module, model = program.module(), onnx.load(path)
    name = model.graph.input[0].name
    session = qcompile.onnx_session(path)
    reference = ReferenceEvaluator(model, new_ops=[MatMul])
    _MADE[recipe, dtype] = (
        lambda x: module(torch.from_numpy(x)).numpy(force=True),
        lambda x: session.run(None, {name: x})[0],
        lambda x: reference.run(None, {name: x})[0],
    )
    return _MADE[recipe, dtype]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("recipe", "dtype"), CASES)
@given(
    values=st.lists(st.tuples(st.integers(0, 127), st.sampled_from(SPECIAL)), max_size=6),
    exponent=st.integers(-30, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_they_agree(
    recipe: str,
    dtype: torch.dtype,
    values: list[tuple[int, float]],
    exponent: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    x = np.random.default_rng(seed).standard_normal((4, 32)).astype(np.float32) * np.float32(2.0**exponent)
    for place, value in values:
        x.flat[place] = value
    program, runtime, reference = exported(recipe, dtype, tmp_path_factory)
    with np.errstate(all="ignore"):
        expected = program(x)
        results = [reference(x), runtime(x)]
    for found in results:
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(expected))
        finite = np.isfinite(expected)
        bound = (1e-4 if dtype == torch.float32 else 6e-2) * max(1e-6, np.abs(expected[finite]).max(initial=0))
        np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=bound)


def test_an_infinity_in_a_block_is_not_hidden(tmp_path_factory: pytest.TempPathFactory) -> None:
    """ONNX Runtime's Clip makes the largest finite number of an infinite amax: the least one is a Max."""
    program, runtime, reference = exported("fp8_block", torch.float32, tmp_path_factory)
    x = np.ones((4, 32), np.float32)
    x[1, 3] = np.inf
    for run in (program, runtime, reference):
        with np.errstate(all="ignore"):
            assert np.isfinite(run(x)).all(1).tolist() == [True, False, True, True]
