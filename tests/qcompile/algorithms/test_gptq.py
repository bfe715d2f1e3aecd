"""`gptq` against plain loops written from the paper, and its corner cases."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompile
from passes.constants import constant
from passes.graph import calls
from passes.ir import DEQUANTIZE
from passes.program import unlift
from qcompile.algorithms.base import make
from qcompile.algorithms.feedback import column_order
from qcompile.errors import CalibrationError, RecipeError
from qcompile.report.record import record_of

Array = np.ndarray
RECIPES = {
    "fp8": "fp8_gemm",
    "int8": "int8",
    "fp8 channel": "fp8_per_channel_per_token",
    "int8 channel": "int8_per_channel_per_token",
    "fp8 block": "fp8_block",
    "nvfp4": "nvfp4_weight_only",
}


def nearest(x: Array, name: str) -> Array:
    """The numbers of a format next to `x`, by ml_dtypes."""
    if name.startswith("int8"):
        return np.clip(np.rint(x), -128, 127)
    kind, most = (ml_dtypes.float4_e2m1fn, 6) if name == "nvfp4" else (ml_dtypes.float8_e4m3fn, 448)
    return np.clip(x, -most, most).astype(np.float32).astype(kind).astype(np.float64)


def paper(weight: Array, x: Array, scale: Array, name: str, damping: float, kind: str, width: int = 1) -> Array:
    """Algorithm 1 of Frantar et al. 2022 without its blocks, in float64: numbers in units of the scale of each element.

    The order of columns and the damping are those of its section 3.3 and of the authors' code.
    """
    w, h = weight.astype(np.float64).copy(), x.T @ x
    size, order = np.diag(h), np.arange(len(h))
    if kind == "activation" or (kind == "block" and width == 1):
        order = np.argsort(-size, kind="stable")
    elif kind == "block":  # whole blocks, and the same within each
        first = np.argsort(-size.reshape(-1, width).sum(1), kind="stable")
        order = np.concatenate([b * width + np.argsort(-size[b * width :][:width], kind="stable") for b in first])
    dead = np.diag(h) == 0
    h = h + np.diag(np.where(dead, 1.0, damping * np.diag(h).mean()))
    w, h, scale = w[:, order], h[np.ix_(order, order)], scale[:, order]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    units = np.zeros_like(w)
    for j in range(w.shape[1]):
        units[:, j] = nearest((w[:, j] / scale[:, j]).astype(np.float32), name)
        error = (w[:, j] - units[:, j] * scale[:, j]) / upper[j, j]
        for k in range(j, w.shape[1]):
            w[:, k] -= error * upper[j, k]
    result = np.zeros_like(units)
    result[:, order] = units
    return result


class Two(nn.Module):
    """Two layers read one tensor, of which one input is always zero."""

    def __init__(self, rows: int = 40, columns: int = 144) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(columns, rows), nn.Linear(columns, rows)
        self.b.weight.data *= 3

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def inputs(count: int = 300, columns: int = 144) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(columns, columns, generator=generator) / 8 + torch.eye(columns)
    x = torch.randn(count, columns, generator=generator) @ mixed * torch.logspace(-1, 1, columns)
    x[:, 5] = 0
    return x


def recipe(name: str, **options: Any) -> qcompile.Recipe:
    return qcompile.load_recipe(name, [f"calibration={{{', '.join(f'{k}: {v}' for k, v in options.items())}}}"])


def quantized(model: nn.Module, batches: list[Tensor], chosen: Any, dtype: torch.dtype) -> Any:
    free = ({0: torch.export.Dim.DYNAMIC},)
    return qcompile.quantize(
        model.eval(),
        (inputs(8, batches[0].shape[1]),),
        recipe=chosen,
        calibration=batches,
        dtype=dtype,
        dynamic_shapes=free,
        progress=False,
    )


def weights_of(program: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of a weight -> its numbers in units of the scale, and the scale of each element."""
    gm, found = unlift(program), {}
    for node in calls(gm.graph, DEQUANTIZE):
        codes, scale = (constant(gm, operand) for operand in node.args[:2])
        if codes is None or not str(node.args[0].target).endswith("weight"):
            continue
        if scale is None:  # of two levels
            inner, outer = (constant(gm, part) for part in node.args[1].args)
            assert inner is not None and outer is not None
            scale = inner.float() * outer
        numbers = unpacked(codes) if codes.dtype == torch.uint8 else codes.float()
        for axis, size in {"nvfp4": ((-1, 16),), "fp8_128x128": ((-2, 128), (-1, 128))}.get(node.kwargs["format"], ()):
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, numbers.shape[axis])
        found[str(node.args[0].target)] = numbers, scale.float().broadcast_to(numbers.shape)
    return found


def unpacked(codes: Tensor) -> Tensor:
    """e2m1, the even one of two in the low nibble."""
    nibbles = np.stack([codes.numpy() & 15, codes.numpy() >> 4], -1).reshape(len(codes), -1)
    return torch.from_numpy(nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32))


@pytest.mark.everyday(3)
@pytest.mark.parametrize("scales", ["max", pytest.param("hessian_mse", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["block", "activation", "none"])
@pytest.mark.parametrize("name", RECIPES)
def test_codes_are_those_of_the_paper(name: str, order: str, scales: str) -> None:
    model, x = Two(), inputs()
    chosen = recipe(RECIPES[name], algorithm="gptq", order=order, scales=scales, block=32, double="true")
    program = quantized(model, [x[:90], x[90:]], chosen, torch.float16)
    found = weights_of(program)
    assert len(found) == 2
    for leaf in "ab":
        weight, (numbers, scale) = model.get_submodule(leaf).weight.detach().numpy(), found[f"{leaf}.weight"]
        wide = scale.double().numpy()
        expected = paper(weight, x.double().numpy(), wide, name, 0.01, order, 16 if name == "nvfp4" else 1)
        np.testing.assert_array_equal(numbers.numpy(), expected)
        plain = nearest((weight / wide).astype(np.float32), name)
        np.testing.assert_array_equal(numbers.numpy()[:, 5], plain[:, 5])  # a dead input

        def error(units: Array, weight: Array = weight, wide: Array = wide) -> float:
            return float((((units * wide - weight) @ x.double().numpy().T) ** 2).sum())

        assert error(expected) < error(plain) * (1 if order == "none" else 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8 channel", "nvfp4"])
def test_float32_and_other_blocks_give_nearly_the_same_codes(name: str) -> None:
    model, x = Two(), inputs()
    found = [
        weights_of(quantized(model, [x], recipe(RECIPES[name], algorithm="gptq", **options), torch.float32))["a.weight"]
        for options in ({"double": "true"}, {}, {"block": 7})
    ]
    for numbers, scale in found[1:]:
        assert torch.equal(scale, found[0][1])
        assert float((numbers != found[0][0]).float().mean()) < 2e-3


BROKEN = {
    "one sample": lambda x: x[:1],
    "equal rows": lambda x: x[:1].expand(64, -1),
    "zeros": lambda x: x * 0,
    "large": lambda x: x * 1e25,
    "small": lambda x: x * 1e-25,
}


@pytest.mark.everyday(2)
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["fp8 channel", "nvfp4"])
def test_a_singular_second_moment_has_an_answer(name: str, kind: str) -> None:
    model, x = Two(8, 32), BROKEN[kind](inputs(columns=32))
    chosen = recipe(RECIPES[name], algorithm="gptq", damping=0)
    program = quantized(model, [x], chosen, torch.bfloat16)
    for numbers, scale in weights_of(program).values():
        assert bool((numbers * scale).isfinite().all()) and bool(numbers.any())
    notices = " ".join(record_of(program).notices)
    if kind == "zeros":
        assert "gptq rounds to the nearest where it saw no input" in notices
    if kind == "one sample":
        assert "so few tokens that weights may be fitted to these: a.weight_quantizer (1 and not 64)" in notices
    flat = Two(8, 32)
    flat.a.weight.data.fill_(0.5)
    numbers, scale = weights_of(quantized(flat, [x], chosen, torch.bfloat16))["a.weight"]
    assert bool((numbers * scale).isfinite().all())


@pytest.mark.everyday(1)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_is_one_error_that_names_the_layer(bad: float) -> None:
    x = inputs(columns=32)
    broken = x.clone()
    broken[3, 2] = bad
    for algorithm in ("gptq", "hessian_mse"):
        chosen = recipe("nvfp4_weight_only", algorithm=algorithm)
        with pytest.raises(CalibrationError, match=r"a\.weight_quantizer: calibration found NaN .* in 1 of 2 runs"):
            quantized(Two(8, 32), [x, broken], chosen, torch.float32)


def in_order(steps: str) -> qcompile.Recipe:
    named = ", ".join(f"{{algorithm: {step}}}" for step in steps.split(", "))
    return qcompile.load_recipe("int8", [f"calibration=[{named}]"])


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ("hessian_mse, gptq", r"calibration\[0\].* hessian_mse chooses \(weights\) .*: say .*scales: hessian_mse}"),
        ("gptq, mse", r"calibration\[0\]: nothing that gptq chooses \(weights\) is left behind mse"),
        ("gptq, hessian_mse", "leave one of them out"),
        ("percentile, mse", r"\(ranges of activations\) is left behind mse"),
        ("max, gptq, percentile", r"calibration\[0\].*max chooses .* behind percentile"),
    ],
)
def test_a_step_of_which_nothing_is_left_is_refused(steps: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        make(in_order(steps).steps)


def test_a_later_step_overrides_what_it_solves_and_nothing_else() -> None:
    x, found = inputs(columns=32), {}
    for steps in ("mse", "gptq", "mse, gptq", "mse, percentile"):
        chosen = in_order(steps)
        found[steps] = quantized(Two(8, 32), [x], chosen, torch.float32).state_dict
    both = found["mse, gptq"]
    assert torch.equal(both["a.weight"], found["gptq"]["a.weight"])
    assert not torch.equal(both["a.weight"], found["mse"]["a.weight"])
    assert torch.equal(both["a.input_scale"], found["mse"]["a.input_scale"])
    assert not torch.equal(both["a.input_scale"], found["gptq"]["a.input_scale"])
    assert torch.equal(found["mse, percentile"]["a.weight"], found["mse"]["a.weight"])


@pytest.mark.everyday(1)
@pytest.mark.parametrize("percentile", [90.0, 99.9, 100.0])
def test_a_percentile_is_that_of_numpy(percentile: float) -> None:
    x = torch.randn(2048, 32, generator=torch.Generator().manual_seed(0)) ** 3
    chosen = recipe("int8", algorithm="percentile", percentile=percentile)
    state = qcompile.calibrate(nn.Linear(32, 8), (x,), recipe=chosen, calibration=[x], progress=False)
    expected = np.percentile(np.abs(x.numpy()), percentile, method="inverted_cdf")
    width = 2.0 ** np.ceil(np.log2(float(x.abs().max()))) / 2048
    assert expected - 1e-6 <= float(state["input_quantizer"]) <= expected + width
    assert percentile < 100 or float(state["input_quantizer"]) == float(x.abs().max())


def test_scales_of_blocks_are_better_when_their_turn_comes() -> None:
    model, x, found = Two(), inputs(600), {}
    for order in ("block", "activation", "none"):
        program = quantized(model, [x[:300]], recipe("nvfp4_weight_only", algorithm="gptq", order=order), torch.float32)
        numbers, scale = weights_of(program)["a.weight"]
        found[order] = float(((numbers * scale - model.a.weight.detach()) @ x[300:].T).square().sum())
    assert found["block"] < 0.97 * min(found["activation"], found["none"])


def test_a_block_that_is_cut_is_the_last() -> None:
    size = torch.tensor([1.0, 2, 9, 9, 3, 4, 100])
    assert column_order(size, "block", 2).tolist() == [2, 3, 5, 4, 1, 0, 6]
    assert (
        column_order(size, "block", 1).tolist() == column_order(size, "activation", 2).tolist() == [6, 2, 3, 5, 4, 1, 0]
    )
