"""`mse` against a search written with NumPy and ml_dtypes: never worse than `max`, and as good as trying them all."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn

import qcompile
from passes.quantize.insert import Quantizer
from passes.quantize.sites import find_sites
from passes.testing import graph_of
from qcompile.algorithms.base import Operand
from qcompile.algorithms.max import Max
from qcompile.algorithms.mse import Mse, MseSettings
from qcompile.algorithms.statistics import Histogram
from qcompile.errors import CalibrationError
from qcompile.quantization.view import graph_view
from qcompile.recipe import MaxSettings, QuantizerConfig
from qcompile.report.record import record_of

Array = np.ndarray
CONFIGS = {
    "fp8": QuantizerConfig("fp8"),
    "fp8 channel": QuantizerConfig("fp8", "per_channel"),
    "fp8 block": QuantizerConfig("fp8", "per_block", (128, 128)),
    "int8": QuantizerConfig("int8"),
    "int8 channel": QuantizerConfig("int8", "per_channel"),
    "nvfp4": QuantizerConfig("nvfp4", "per_block", (1, 16)),
}


def rounded(x: Array, scale: Array, name: str) -> Array:
    """What codes of `x` stand for, in float64."""
    quotient = (x / scale).astype(np.float32)
    if name.startswith("int8"):
        return np.clip(np.rint(quotient), -128, 127) * scale.astype(np.float64)
    kind, most = (ml_dtypes.float4_e2m1fn, 6) if name == "nvfp4" else (ml_dtypes.float8_e4m3fn, 448)
    return np.clip(quotient, -most, most).astype(kind).astype(np.float64) * scale.astype(np.float64)


def spread(quantizer: Quantizer, shape: tuple[int, ...]) -> Array:
    """The scale of each element."""
    if quantizer.block_scales is None:
        assert quantizer.scale is not None
        return np.broadcast_to(quantizer.scale.numpy(), shape)
    scale = quantizer.block_scales.float()
    if quantizer.scale is not None:
        scale = scale * quantizer.scale
    for axis, size in enumerate(quantizer.format.sizes, -len(quantizer.format.sizes)):
        scale = scale.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return scale.numpy()


def errors(weight: Tensor, quantizer: Quantizer, name: str) -> Array:
    x = weight.detach().numpy()
    return (rounded(x, spread(quantizer, x.shape), name) - x).astype(np.float64) ** 2


def solved(module: nn.Module, x: Tensor, name: str, **options: object) -> dict[Operand, tuple[Quantizer, Quantizer]]:
    """Weight -> what `max` and `mse` make of it."""
    gm = graph_of(module, x)
    view = graph_view(gm, {s: CONFIGS[name] for s in find_sites(gm) if s.operand == "weight"}, torch.float32)
    ours = Mse(MseSettings(algorithm="mse", **options)).solve(view, {})  # type: ignore[arg-type]
    theirs = Max(MaxSettings(power_of_two=bool(options.get("power_of_two")))).solve(view, {})
    return {operand: (measured(theirs[operand], operand), ours[operand]) for operand in view.weights}


def measured(quantizer: Quantizer, operand: Operand) -> Quantizer:
    """With block scales, where they are what the blocks measure."""
    if not quantizer.format.sizes:
        return quantizer
    weight = torch.cat([values for _, values in operand.rows()])
    scales = torch.ops.qcompile.dynamic_quantize(weight, quantizer.scale, format=quantizer.format.name)[1]
    return Quantizer(quantizer.format, quantizer.scale, scales)


def of_weight(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return linear


WEIGHTS = arrays(
    np.float32,
    st.tuples(st.sampled_from([1, 3, 130]), st.sampled_from([16, 48])),
    elements=st.sampled_from([0.0, 1e-30, 6e-8, -0.01, 0.37, 1.0, -2.5, 3e4, 1e30]) | st.floats(-4, 4, width=32),
    fill=st.floats(-1, 1, width=32),
)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=12, deadline=None)
@given(weight=WEIGHTS, power_of_two=st.booleans())
def test_it_is_never_worse_than_max(name: str, weight: Array, power_of_two: bool) -> None:
    module = of_weight(torch.from_numpy(weight))
    ((theirs, ours),) = solved(module, torch.zeros(1, weight.shape[1]), name, power_of_two=power_of_two).values()
    for quantizer in (theirs, ours):
        stored = [t for t in (quantizer.scale, quantizer.block_scales) if t is not None]
        assert all(bool((t.float() > 0).all() and t.float().isfinite().all()) for t in stored)
    own, base = errors(module.weight, ours, name), errors(module.weight, theirs, name)
    axis = -1 if "channel" in name or name == "nvfp4" else None
    blocks = own.reshape(-1, 16) if name == "nvfp4" else own
    assert (blocks.sum(axis) <= base.reshape(blocks.shape).sum(axis) * (1 + 1e-5) + 1e-300).all()
    if power_of_two and not ours.format.sizes:
        assert ours.scale is not None and bool((ours.scale.log2() % 1 == 0).all())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_finds_the_best_of_what_it_may_try(name: str) -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 1, 6)[:, None]
    ((theirs, ours),) = solved(of_weight(weight), torch.zeros(1, 48), name, candidates=16).values()
    base, factors = spread(theirs, (6, 48)), [1.0, *np.linspace(0.5, 1.75, 16)]
    if name == "nvfp4":  # its block scales are e4m3 numbers
        assert theirs.block_scales is not None and theirs.scale is not None
        own = theirs.block_scales.float()
        numbers = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        tried = [
            np.where((n >= own / 2) & (n <= own * 1.75), n, own).repeat(16, 1) * theirs.scale.numpy() for n in numbers
        ]
    else:
        tried = [(base * np.float32(factor)).astype(np.float32) for factor in factors]
    found = np.stack([(rounded(weight.numpy(), scale, name) - weight.numpy()) ** 2 for scale in tried])
    share = {"nvfp4": (-1, 16), "fp8 channel": (6, 48), "int8 channel": (6, 48)}.get(name, (1, -1))
    best = found.reshape(len(tried), *(share if share[0] > 0 else (18, 16))).sum(-1).min(0)
    mine = errors(weight, ours, name).reshape(best.shape[0], -1).sum(-1)
    np.testing.assert_allclose(mine, best, rtol=2e-5)
    gain = {"int8": 1.0, "int8 channel": 0.999, "fp8": 0.99}.get(name, 0.95)
    assert mine.sum() <= errors(weight, theirs, name).sum() * gain


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.o = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.k.weight.data *= 0.2

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.k(x))


@pytest.mark.parametrize("name", ["fp8", "int8", "nvfp4"])
def test_weights_that_share_a_scale_are_searched_together(name: str) -> None:
    module = Siblings()
    found = {operand.name[0]: pair for operand, pair in solved(module, torch.randn(2, 32), name).items()}
    scales = {leaf: ours.scale for leaf, (_, ours) in found.items()}
    assert all(scale is not None for scale in scales.values())
    assert scales["q"] == scales["k"] != scales["o"]
    together = [sum(errors(module.get_submodule(n).weight, found[n][i], name).sum() for n in "qk") for i in (0, 1)]
    assert together[1] <= together[0]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 130, 144) * torch.tensor([1.0, 0.1, 10.0])[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.qcompile.batched_linear(x, self.weight)
        return result


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_weights_like_others(name: str) -> None:
    module = Experts()
    ((theirs, ours),) = solved(module, torch.randn(3, 2, 144), name, candidates=6).values()
    own, base = errors(module.weight, ours, name), errors(module.weight, theirs, name)
    assert own.sum() < base.sum() if not name.startswith("int8") else own.sum() <= base.sum()


def test_a_weight_with_nan_is_an_error_and_one_of_zeros_is_none() -> None:
    weight = torch.zeros(4, 32)
    for name in CONFIGS:
        ((theirs, ours),) = solved(of_weight(weight), torch.zeros(1, 32), name).values()
        assert np.array_equal(spread(ours, (4, 32)), spread(theirs, (4, 32)))
    weight[1, 3] = float("nan")
    for name in CONFIGS:
        with pytest.raises(CalibrationError, match="weight holds NaN or infinity"):
            solved(of_weight(weight), torch.zeros(1, 32), name)


def mse(recipe: str, **options: object) -> qcompile.Recipe:
    settings = {"algorithm": "mse", **options}
    return qcompile.load_recipe(recipe, [f"calibration={{{', '.join(f'{k}: {v}' for k, v in settings.items())}}}"])


@pytest.mark.parametrize(("recipe", "name"), [("int8", "int8"), ("fp8_gemm", "fp8")])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_range_of_an_activation_is_that_of_the_least_error(recipe: str, name: str, power_of_two: bool) -> None:
    model, generator = nn.Linear(64, 32).eval(), torch.Generator().manual_seed(0)
    x = torch.randn(2048, 64, generator=generator)
    x[0, 0] = 40.0  # an outlier that is not worth its range
    chosen = mse(recipe, power_of_two=str(power_of_two).lower())
    state = qcompile.calibrate(model, (x,), recipe=chosen, calibration=[x], progress=False)
    (found,) = state.values()
    most = 127 if name == "int8" else 448

    def error(amax: float) -> float:
        exponent = np.ceil(np.log2(amax / most))
        scale = np.float32(2.0**exponent if power_of_two else amax / most)
        return float(((rounded(x.numpy(), scale, name) - x.numpy()).astype(np.float64) ** 2).sum())

    best = min(error(amax) for amax in np.geomspace(2, 40, 200))
    assert error(float(found)) <= best * 1.02 and error(float(found)) <= error(40.0)
    assert float(found) < 40 or name == "fp8"
    program = qcompile.quantize(model, (x,), recipe=chosen, calibration=state, progress=False, dtype=torch.float32)
    direct = qcompile.quantize(model, (x,), recipe=chosen, calibration=iter([x]), progress=False, dtype=torch.float32)
    assert all(torch.equal(program.state_dict[n].float(), t.float()) for n, t in direct.state_dict.items())


def test_activations_that_nothing_reached_stay_and_nan_is_an_error() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)

    args = torch.randn(4, 16), torch.zeros(4, 16)
    call: Callable[..., qcompile.quantization.quantize.ExportedProgram] = qcompile.quantize  # type: ignore[name-defined]
    program = call(Two().eval(), args, recipe=mse("int8"), calibration=[args], progress=False)
    assert [d.module for d in record_of(program).declined if d.pass_name == "Calibration"] == ["b"]
    with pytest.raises(CalibrationError, match=r"a\.input_quantizer: calibration found nan"):
        call(Two().eval(), args, recipe=mse("int8"), calibration=[(args[0] * np.nan, args[1])], progress=False)


def test_ranges_can_be_left_to_max() -> None:
    x = torch.randn(8, 16)
    kept = qcompile.calibrate(nn.Linear(16, 16), (x,), recipe=mse("int8", smallest_range=1), calibration=[x])
    assert float(kept["input_quantizer"]) == float(x.abs().max())
    assert Mse(MseSettings(algorithm="mse")).settings.smallest_range < 1 and Histogram.additive
