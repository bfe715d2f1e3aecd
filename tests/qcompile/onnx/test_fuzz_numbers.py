"""Any numbers into exported files: ONNX Runtime, onnx.reference and the program agree on what is finite.

Values agree, too. INT8 has no NaN: what a quantizer makes of one is finite, and every runtime's own choice (and ONNX
Runtime 1.31 makes -128 of +inf in float16), so that only finiteness is compared where an input is NaN or infinite.
Three kinds of rows have no one answer:
- ONNX Runtime computes float16 in float32, and does not round in between: it is no judge of rows in which the float
  model leaves float16.
- Within a fourth of the largest number, the rounding of codes decides which side a value falls on.
- A LayerNorm whose variance leaves float32 is NaN in torch and 0 elsewhere: the block gets no finite input beyond 2^60.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_quantize_linear as quantize_linear
from torch import Tensor, nn

import qcompile
from qcompile.onnx.execute import MatMul
from qcompile.recipe import list_recipes

SPECIAL = [np.nan, np.inf, -np.inf, 65504, -65504, 7e4, 1e30, -3e38, 1e-40, -1e-7, 6e-5, 0.0, -0.0, 4.0]
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
Runs = dict[str, Callable[..., Any]]
_MADE: dict[Any, Any] = {}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Block(nn.Module):
    """Attention with a mask, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (2, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(x)


class LayerNormalization(OpRun):
    """In float32, as `stash_type` says; onnx 1.23 squares float16 in float16."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, bias: Any, axis: int, epsilon: float, stash_type: int) -> tuple[Any]:
        wide = x.astype(np.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        root = np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(epsilon))
        return ((centred / root * scale.astype(np.float32) + bias.astype(np.float32)).astype(x.dtype),)


class QuantizeLinear(quantize_linear.QuantizeLinear_23):  # type: ignore[misc]
    """onnx 1.23 converts to int32 before it clips, and what leaves that is -128."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, *zero: Any, **options: Any) -> tuple[Any]:
        if zero and zero[0].dtype == np.int8:
            wide = x.astype(np.float32) / scale.astype(np.float32)  # one scale: shipped recipes have no other for x
            return (np.clip(np.rint(wide), -128, 127).astype(np.int8),)
        result: tuple[Any] = super()._run(x, scale, *zero, **options)
        return result


def network(kind: str) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Any, ...]]:
    """A model, example inputs and its dynamic shapes."""
    torch.manual_seed(0)
    size = torch.export.Dim.DYNAMIC
    if kind == "mlp":
        return Mlp().eval(), (torch.randn(4, 32),), ({0: size},)
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    return Block().eval(), (torch.randn(2, 5, 32), seen), ({0: size, 1: size}, {0: size, 2: size, 3: size})


def runs(
    recipe: str, dtype: torch.dtype, path: Path, kind: str, target: Any = "portable", model: nn.Module | None = None
) -> Runs:
    """The program as a function, the same of the file in `onnx.reference` and, where it can, in ONNX Runtime."""
    made, args, shapes = network(kind)
    program = qcompile.quantize(
        model or made, args, recipe=recipe, calibration=[args], dtype=dtype, dynamic_shapes=shapes, progress=False
    )
    qcompile.export_onnx(program, path, target=target)
    module, file = program.module(), onnx.load(path)
    names = [value.name for value in file.graph.input]
    reference = ReferenceEvaluator(file, new_ops=[MatMul, LayerNormalization, QuantizeLinear])
    found: Runs = {
        "program": lambda *a: module(*map(torch.from_numpy, a)).numpy(force=True),
        "reference": lambda *a: reference.run(None, dict(zip(names, a, strict=True)))[0],
    }
    if "nvfp4" not in recipe and dtype != BFLOAT16:  # which it has no CPU kernels for
        session = qcompile.onnx_session(path)
        found["onnxruntime"] = lambda *a: session.run(None, dict(zip(names, a, strict=True)))[0]
    return found


def cached(recipe: str, dtype: torch.dtype, kind: str, target: str, folder: pytest.TempPathFactory) -> Runs:
    key = (recipe, dtype, kind, target)
    if key not in _MADE:
        _MADE[key] = runs(recipe, dtype, folder.mktemp("fuzz") / "m.onnx", kind, target)
    return _MADE[key]  # type: ignore[no-any-return]


def inputs(kind: str, seed: int, exponent: int, values: list[tuple[int, float]], dtype: torch.dtype) -> tuple[Any, ...]:
    """x, rounded to `dtype` where ONNX Runtime would not, and for the block a mask; each row of it sees one key."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4, 32) if kind == "mlp" else (2, 5, 32)).astype(np.float32) * np.float32(2.0**exponent)
    for place, value in values:
        x.flat[place] = value
    if dtype != FLOAT32:
        x = torch.from_numpy(x).to(dtype).float().numpy()
    if kind == "mlp":
        return (x,)
    x = np.where(np.abs(x) > 2.0**60, np.where(np.isinf(x), x, np.float32(5.0)), x)
    seen = rng.random((2, 1, 5, 5)) < 0.5
    seen[:, :, np.arange(5), rng.integers(0, 5, 5)] = True
    return x, seen


def extremes(model: nn.Module, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, Any]:
    """Which rows of x leave `dtype` in the float model, and in which a value is too near its end to tell."""
    limit, sizes = torch.finfo(dtype).max, []
    x = torch.from_numpy(args[0])

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        sizes.append(output.detach().abs().flatten(1))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            model.double()(x.double(), *map(torch.from_numpy, args[1:]))
    finally:
        for handle in handles:
            handle.remove()
    size = torch.cat([x.abs().flatten(1), *sizes], 1)
    leaves = (size.isfinite() & (size > 0.8 * limit)).any(1)
    near = ((size > 0.8 * limit) & (size < 1.25 * limit)).any(1)
    return leaves.numpy(), near.numpy()


def agree(found: Runs, args: tuple[Any, ...], model: nn.Module, recipe: str, dtype: torch.dtype) -> None:
    leaves, near = extremes(model, args, dtype)
    with np.errstate(all="ignore"):
        results = {name: run(*args) for name, run in found.items()}
    expected = results.pop("program")
    # a code at a tie: float32 sums in another order, half precision rounds in other places; a code of FP4 is coarse
    tolerance = (3e-2 if dtype == FLOAT32 else 0.1) * (2 if "nvfp4" in recipe else 1)
    for name, got in results.items():
        assert got.shape == expected.shape
        for row in np.flatnonzero(~(leaves if name == "onnxruntime" and dtype == FLOAT16 else near)):
            finite = np.isfinite(expected[row])
            if recipe.startswith("int8") and not np.isfinite(args[0][row]).all():
                # it has no code for a NaN, which ReduceMax of ONNX Runtime passes over where a token is measured
                if (recipe, name) != ("int8_per_channel_per_token", "onnxruntime"):
                    np.testing.assert_array_equal(np.isfinite(got[row]), finite, name)
                continue
            np.testing.assert_array_equal(np.isfinite(got[row]), finite, name)
            size = max(1e-6, np.abs(expected[row][finite]).max(initial=0))
            np.testing.assert_allclose(got[row][finite], expected[row][finite], rtol=0, atol=tolerance * size)


EVERYDAY = {
    ("fp8", FLOAT32, "mlp", "portable"),
    ("int8", FLOAT32, "mlp", "portable"),
    ("fp8_per_channel_per_token", FLOAT16, "mlp", "portable"),
}
CASES = [
    pytest.param(*case, marks=() if case in EVERYDAY else (pytest.mark.slow,))
    for recipe in list_recipes()
    for dtype in (FLOAT32, FLOAT16, BFLOAT16)
    for kind in ("mlp", "block")
    for target in ("portable", "tensorrt")
    if (case := (recipe, dtype, kind, target))[1] != BFLOAT16 or target == "portable"
]


@pytest.mark.parametrize(("recipe", "dtype", "kind", "target"), CASES)
@given(
    values=st.lists(st.tuples(st.integers(0, 127), st.sampled_from(SPECIAL)), max_size=6),
    exponent=st.integers(-30, 20),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_they_agree(
    recipe: str,
    dtype: torch.dtype,
    kind: str,
    target: str,
    values: list[tuple[int, float]],
    exponent: int,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    found = cached(recipe, dtype, kind, target, tmp_path_factory)
    agree(found, inputs(kind, seed, exponent, values, dtype), network(kind)[0], recipe, dtype)


@pytest.mark.parametrize(("recipe", "dtype", "kind", "target"), CASES)
def test_empty_axes(
    recipe: str, dtype: torch.dtype, kind: str, target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """An empty batch, and an empty sequence."""
    for lead in [(0,)] if kind == "mlp" else [(0, 5), (2, 0), (0, 0)]:
        mask = () if kind == "mlp" else (np.ones((lead[0], 1, lead[1], lead[1]), bool),)
        for name, run in cached(recipe, dtype, kind, target, tmp_path_factory).items():
            assert run(np.zeros((*lead, 32), np.float32), *mask).shape == (*lead, 16 if kind == "mlp" else 32), name


WEIGHTS: dict[str, Callable[[Tensor], Any]] = {
    "zeros": lambda weight: weight.zero_(),
    "a row of zeros": lambda weight: weight[3].zero_(),
    "subnormal": lambda weight: weight.mul_(1e-40),
    "small": lambda weight: weight.mul_(1e-6),
    "one outlier": lambda weight: weight[0, 0].fill_(1e4),
    "beyond float16": lambda weight: weight.mul_(1e30),
}
WEIGHTS_EVERYDAY = ("one outlier", "fp8_per_channel_per_token", FLOAT16)
WEIGHT_CASES = [
    pytest.param(*case, marks=() if case == WEIGHTS_EVERYDAY else (pytest.mark.slow,))
    for weights in WEIGHTS
    for recipe in ("fp8", "fp8_block", "fp8_per_channel_per_token", "int8", "nvfp4", "nvfp4_weight_only")
    for dtype in (FLOAT32, FLOAT16)
    if (case := (weights, recipe, dtype))
]


@pytest.mark.parametrize(("weights", "recipe", "dtype"), WEIGHT_CASES)
def test_weights_of_every_size(weights: str, recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Numbers beyond float16 are refused for it; all else agrees, and stays finite where the float model does."""
    model, _, _ = network("mlp")
    with torch.no_grad():
        WEIGHTS[weights](model.fc1.weight)  # type: ignore[arg-type, union-attr]
    if weights == "beyond float16" and dtype == FLOAT16:
        with pytest.raises(qcompile.QCompileError, match="65504"):
            runs(recipe, dtype, tmp_path / "m.onnx", "mlp", model=model)
        return
    found = runs(recipe, dtype, tmp_path / "m.onnx", "mlp", model=model)
    for seed, exponent in enumerate((-20, -3, 0)):
        x = inputs("mlp", seed, exponent, [], dtype)
        agree(found, x, model, recipe, dtype)
        assert np.isfinite(found["program"](*x)).all()


def test_an_infinity_in_a_block_is_not_hidden(tmp_path: Path) -> None:
    """ONNX Runtime's Clip makes the largest finite number of an infinite amax: the least one is a Max."""
    x = np.ones((4, 32), np.float32)
    x[1, 3] = np.inf
    for run in runs("fp8_block", FLOAT32, tmp_path / "m.onnx", "mlp").values():
        with np.errstate(all="ignore"):
            assert np.isfinite(run(x)).all(1).tolist() == [True, False, True, True]
