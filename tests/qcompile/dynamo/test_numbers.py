"""Inductor's code against the uncompiled program, for shapes that are no multiple of anything."""

from __future__ import annotations

import pytest
import torch

import qcompile

RECIPES = ("fp8_per_channel_per_token", "fp8_block", "int8", "int8_per_channel_per_token", "nvfp4_weight_only", "nvfp4")


def _model(k: int, n: int, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(k)
    layers = [torch.nn.LayerNorm(k), torch.nn.Linear(k, n), torch.nn.GELU(), torch.nn.Linear(n, 48)]
    return torch.nn.Sequential(*layers).to(dtype).eval()


def _compare(recipe: str, k: int, n: int, rows: int, dtype: torch.dtype) -> None:
    model, x = _model(k, n, dtype), torch.randn(rows, k, dtype=dtype)
    example = torch.randn(34, k, dtype=dtype)
    state = qcompile.calibrate(model, (example,), recipe=recipe, calibration=[example], progress=False)
    program = qcompile.quantize(model, (x,), recipe=recipe, calibration=state, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="qcompile", options={"recipe": recipe, "calibration": state})
    with torch.no_grad():
        expected, found, exact = (run(x).float() for run in (program.module(), compiled, model))
    if dtype == torch.float32:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp_min(1)
    else:  # Inductor does not round between operators that it fuses, so a value may lie on the other side of a code
        assert (found - expected).norm() <= 0.5 * (expected - exact).norm() + 1e-2 * expected.norm()


@pytest.mark.slow
def test_a_cut_block() -> None:
    """Inductor splits loops at block ends, and left out what is behind the last whole one."""
    _compare("fp8_block", 192, 130, 34, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "n", "rows"), [(192, 144, 34), (100, 72, 1), (130, 260, 17), (16, 16, 3)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_odd_shapes(recipe: str, k: int, n: int, rows: int, dtype: torch.dtype) -> None:
    _compare(recipe, k, n, rows, dtype)
