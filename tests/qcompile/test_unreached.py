"""Layers that calibration gave no range: left unquantized, listed, and right on other data; gaps in data are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qcompile
from qcompile.report.record import record_of


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)))


class Mixture(nn.Module):
    """Tokens go to the first expert where x[0] < 0, else to the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(Expert() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            (tokens,) = torch.where((x[:, 0] >= 0).long() == index)
            out = out.index_add(0, tokens, expert(x[tokens]))
        return out


class Branches(nn.Module):
    """A condition beside the data, and attention over it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(32, 32), nn.Linear(32, 32)
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (self.q(x), self.k(c), self.v(c)))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.a(x) + self.c(c) + y.transpose(1, 2).flatten(2)


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def declined(program: ExportedProgram) -> dict[str, str]:
    return {d.module: d.reason for d in record_of(program).declined if d.pass_name == "Calibration"}


@pytest.mark.everyday(1)
@pytest.mark.parametrize("recipe", ["fp8", "int8", "nvfp4"])
def test_an_expert_without_tokens_stays_unquantized(recipe: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Mixture().eval()
    seen = torch.randn(24, 16)
    seen[:, 0] = -seen[:, 0].abs() - 0.1
    program = qcompile.quantize(model, (seen,), recipe=recipe, calibration=[seen], progress=False, dtype=torch.float32)
    reason = "not quantized: input_quantizer: calibration never reached it"
    assert declined(program) == {"experts.1.w1": reason, "experts.1.w2": reason}
    assert "experts.1.w1 (calibration never reached it)" in caplog.text
    new = seen * torch.tensor([-1.0] + [1.0] * 15)
    assert error(program.module()(new), model(new)) < 1e-6
    assert 0 < error(program.module()(seen), model(seen)) < 0.3


@pytest.mark.everyday(1)
@pytest.mark.parametrize("recipe", ["fp8", "int8", "nvfp4_fp8_attention"])
def test_a_branch_of_zeros_stays_unquantized_and_its_file_is_legal(recipe: str, tmp_path: Path) -> None:
    model = Branches().eval()
    x, c = torch.randn(2, 32, 32), torch.randn(2, 32, 32)
    zeros = (x, torch.zeros_like(c))
    program = qcompile.quantize(model, zeros, recipe=recipe, calibration=[zeros], progress=False)
    left = {"c", "k", "v"} | ({""} if recipe != "int8" else set())
    assert declined(program).keys() == left
    assert all("it was zero in all of calibration" in reason for reason in declined(program).values())
    assert error(program.module()(x, c), model(x, c)) < 0.15
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    assert left <= report.unquantized.keys() and {"a", "q"} == report.quantized.keys()
    assert {d.module for d in report.declined if d.pass_name == "Calibration"} == left
    if recipe != "nvfp4_fp8_attention":
        session = qcompile.onnx_session(tmp_path / "m.onnx")
        (found,) = session.run(None, {"x": x.numpy(), "c": c.numpy()})
        assert error(torch.from_numpy(found), program.module()(x, c)) < 0.02


def test_a_calibrated_state_has_zero_for_it_and_leaves_it() -> None:
    model, x = Branches().eval(), torch.randn(2, 32, 32)
    zeros = (x, torch.zeros_like(x))
    state = qcompile.calibrate(model, zeros, recipe="fp8", calibration=[zeros], progress=False)
    assert state["c.input_quantizer"] == 0 and state["a.input_quantizer"] > 0
    program = qcompile.quantize(model, zeros, recipe="fp8", calibration=state, progress=False, dtype=torch.float32)
    assert declined(program).keys() == {"c", "k", "v", ""}
    assert error(program.module()(x, x), model(x, x)) < 0.1


class Small(nn.Module):
    def __init__(self, size: float, weight: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size, self.linear = size, nn.Linear(32, 16, bias=False)
        self.linear.weight.data *= weight

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.size)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("recipe", ["fp8", "int8"])
@pytest.mark.parametrize(("size", "weight"), [(2e-6, 1.0), (1.0, 2e-5), (2e-6, 2e-5)])
def test_small_numbers_are_no_refusal(recipe: str, size: float, weight: float, tmp_path: Path) -> None:
    model, x = Small(size, weight).eval(), torch.randn(8, 32)
    program = qcompile.quantize(model, (x,), recipe=recipe, calibration=[x], progress=False)
    notices = record_of(program).notices
    assert ("linear.input_scale" in str(notices)) == (size < 1) and ("linear.weight_" in str(notices)) == (weight < 1)
    found = program.module()(x)
    assert torch.isfinite(found).all()
    if size * weight > 1e-6:
        assert error(found, model(x)) < 0.2
    qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    (run,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(run, found.numpy(), rtol=0.02, atol=1.2e-7)  # two of float16's least numbers


@settings(max_examples=6, deadline=None)
@given(st.lists(st.floats(-9, 0), min_size=16, max_size=16), st.floats(-7, 2))
def test_channels_of_any_size_are_finite_and_saturate_nothing(channels: list[float], size: float) -> None:
    model = Small(10.0**size, 1.0).eval()
    model.linear.weight.data *= 10.0 ** torch.tensor(channels)[:, None]
    x = torch.randn(4, 32)
    program = qcompile.quantize(model, (x,), recipe="int8", calibration=[x], progress=False)
    found, expected = program.module()(x), model(x).detach()
    assert torch.isfinite(found).all()
    # what a step of the input, of each channel's weight and of float16 is worth at most
    inputs, weights = x * 10.0**size, model.linear.weight.detach()
    step = max(float(inputs.abs().max()) / 127, 2.0**-24)
    steps = (weights.abs().amax(1) / 127).clamp(min=2.0**-24)
    bound = step * weights.abs().sum(1) + inputs.abs().sum(1, keepdim=True) * steps + 32 * step * steps
    assert bool(((found - expected).abs() <= bound + expected.abs() * 2e-3 + 2.0**-24).all())


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return self.linear(torch.cat([past, x], 1)).mean(1)


def notices_of(model: nn.Module, args: tuple[Tensor, ...], batches: list[Any], **options: Any) -> list[str]:
    program = qcompile.quantize(model.eval(), args, recipe="fp8_gemm", calibration=batches, progress=False, **options)
    return [n for n in record_of(program).notices if "calibration" in n]


def test_sizes_that_calibration_had_not_are_told() -> None:
    args = (torch.randn(2, 4, 8), torch.randn(2, 6, 8))
    batch, past = Dim("batch"), Dim("past", min=0, max=64)
    shapes = ({0: batch}, {0: batch, 1: past})
    (notice,) = notices_of(Cached(), args, [args], dynamic_shapes=shapes)
    assert notice == "axis 1 of past was 6 in calibration, and the program takes 0 to 64, and 0 was not among them"
    empty = (args[0], torch.randn(2, 0, 8))
    longest = (args[0], torch.randn(2, 64, 8))
    assert notices_of(Cached(), args, [args, empty, longest], dynamic_shapes=shapes) == []


def test_one_sample_and_a_batch_of_zeros_are_told() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(1, 8)
    assert notices_of(model, (x,), [x]) == ["calibration had one sample: the ranges are those of that alone"]
    zero, good = torch.zeros(2, 8), torch.randn(2, 8)
    (notice,) = notices_of(model, (good,), [good, zero])
    assert notice.startswith("calibration batch 1: every number is 0")
    assert notices_of(model, (good,), [good]) == []
