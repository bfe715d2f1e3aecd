"""`hessian_mse` against trying all scales with NumPy and ml_dtypes; experts by the tokens that they get."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompile
from passes.quantize.sites import find_sites
from passes.testing import graph_of
from qcompile.algorithms.base import View
from qcompile.algorithms.gptq import Gptq, GptqSettings
from qcompile.algorithms.hessian_mse import HessianMse, HessianMseSettings
from qcompile.algorithms.inputs import InputMoments
from qcompile.algorithms.observe import observe
from qcompile.errors import CheckpointError
from qcompile.quantization.view import graph_view
from qcompile.recipe import QuantizerConfig
from qcompile.report.record import record_of
from tests.qcompile.algorithms.test_gptq import inputs, nearest, paper, quantized, recipe, weights_of
from tests.qcompile.checkpoint.models import save, tiny

Array = np.ndarray


def counted(error: Array, x: Array, width: int = 16) -> Array:
    """`[N, K]` -> `e^T H e` of each block of `width`, in float64."""
    parts = []
    for start in range(0, error.shape[1], width):
        part = slice(start, start + width)
        parts.append(((x[:, part] @ error[:, part].T) ** 2).sum(0))
    return np.stack(parts, -1)


def test_blocks_of_nvfp4_have_the_best_scale_of_all_e4m3_numbers_near() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(48, 24, bias=False), inputs(columns=48)
    found = {}
    for algorithm in ("max", "mse", "hessian_mse"):
        program = quantized(model, [x], recipe("nvfp4_weight_only", algorithm=algorithm), torch.float32)
        ((_, (numbers, scale)),) = weights_of(program).items()
        found[algorithm] = (numbers * scale).double().numpy(), scale.numpy()
    weight, x64 = model.weight.detach().numpy(), x.double().numpy()
    whole = np.float32(np.abs(weight).max() / 2688)
    own = found["max"][1][:, ::16] / whole
    tried = []
    for number in np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32):
        scale = np.where((number >= own / 2) & (number <= own * 1.75), number, own).repeat(16, 1) * whole
        units = nearest((weight / scale).astype(np.float32), "nvfp4")
        tried.append(counted(units * scale.astype(np.float64) - weight, x64))
    best = np.stack(tried).min(0)
    mine = {name: counted(values - weight, x64) for name, (values, _) in found.items()}
    np.testing.assert_allclose(mine["hessian_mse"], best, rtol=1e-3)
    assert mine["hessian_mse"].sum() < 0.9 * mine["mse"].sum() < mine["max"].sum()


@pytest.mark.everyday(1)
@pytest.mark.parametrize("name", ["fp8_gemm", "int8", "fp8_per_channel_per_token", "fp8_block"])
def test_the_weighed_error_is_no_larger_than_that_of_other_algorithms(name: str) -> None:
    torch.manual_seed(0)
    model, x, found = nn.Linear(144, 40, bias=False), inputs(), {}
    for algorithm in ("max", "mse", "hessian_mse"):
        program = quantized(model, [x], recipe(name, algorithm=algorithm), torch.float32)
        ((_, (numbers, scale)),) = weights_of(program).items()
        found[algorithm] = counted((numbers * scale - model.weight.detach()).double().numpy(), x.double().numpy())
    sums = {algorithm: float(error.sum()) for algorithm, error in found.items()}
    assert sums["hessian_mse"] <= min(sums["mse"], sums["max"]) * (1 + 1e-5)
    assert sums["hessian_mse"] < sums["max"]


class Mixture(nn.Module):
    """As `qcompile.capture.experts` writes them: every expert on every token, times the weight of its router."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(32, 3)
        self.up, self.down = nn.Parameter(torch.randn(3, 48, 32) / 4), nn.Parameter(torch.randn(3, 32, 48) / 4)

    def asked(self, x: Tensor) -> Tensor:
        experts = torch.arange(3).view(3, 1, 1)
        return (self.router(x).argmax(-1)[:, None] == experts).to(x.dtype).sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.asked(x)
        hidden = torch.ops.qcompile.batched_linear(x.unsqueeze(0), self.up).relu()
        result = torch.ops.qcompile.batched_linear(hidden, self.down)
        return torch.where(weight == 0, 0.0, result * weight).sum(0)


def test_experts_are_seen_with_the_tokens_that_they_got() -> None:
    model, x = Mixture().eval(), inputs(64, 32)
    gm = graph_of(model, x)
    config = QuantizerConfig("nvfp4", "per_block", (1, 16))
    view = graph_view(
        gm, {s: config for s in find_sites(gm) if s.operand == "weight" and s.operator.groups}, torch.float32
    )
    step = HessianMse(HessianMseSettings(algorithm="hessian_mse"))
    watched = step.watch(view)
    program = torch.export.export(model, (x,))
    observe(gm, program, {node: [statistic] for node, statistic in watched.items()}, [x], progress=False)
    asked, moments = model.asked(x)[..., 0].bool(), InputMoments(view.weights, watched)
    for weight, given in zip(view.weights, (x.expand(3, -1, -1), (x @ model.up.transpose(-1, -2)).relu()), strict=True):
        tokens, blocks = moments.tokens(weight), moments.blocks(weight, 16)
        assert tokens is not None and tokens.tolist() == asked.sum(-1).tolist() and int(tokens.min()) > 0
        assert blocks is not None
        for expert in range(3):
            own = given[expert][asked[expert]].detach().double()
            for index, block in enumerate(blocks[expert]):
                part = own[:, index * 16 : index * 16 + 16]
                torch.testing.assert_close(block, part.T @ part, rtol=1e-5, atol=1e-4)
    few = int(tokens.min())
    view.notices.clear()
    step.solve(view, watched)
    assert (f"{few} and not 32" in " ".join(view.notices)) == (few < 32)


def test_gptq_rounds_each_expert_with_its_own_tokens() -> None:
    model, x = Mixture().eval(), inputs(90, 32)
    with torch.no_grad():
        model.router.bias[2] = -1e9  # nobody asks it
    gm = graph_of(model, x)
    experts = [site for site in find_sites(gm) if site.operand == "weight" and site.operator.groups]
    view = graph_view(gm, dict.fromkeys(experts, QuantizerConfig("int8", "per_channel")), torch.float32)
    step = Gptq(GptqSettings(algorithm="gptq", scales="max", double=True))
    watched = step.watch(view)
    program = torch.export.export(model, (x,))
    observe(gm, program, {node: [statistic] for node, statistic in watched.items()}, [x], progress=False)
    solved, asked = step.solve(view, watched), model.asked(x)[..., 0].bool()
    up, first = model.up.detach(), solved[view.weights[0]]
    assert first.codes is not None and first.scale is not None
    for expert in range(3):
        scale = first.scale[expert].double().expand(-1, 32).numpy()
        plain = nearest((up[expert].numpy() / scale).astype(np.float32), "int8")
        tokens = x[asked[expert]].double().numpy()
        expected = paper(up[expert].numpy(), tokens, scale, "int8", 0.01, "block") if len(tokens) else plain
        np.testing.assert_array_equal(first.codes[expert].numpy(), expected)
        assert (expected == plain).all() == (expert == 2)
    assert "up.weight_quantizer" in view.notices[0] or "1 of 3 experts, 0 and not 64" in view.notices[0]


class Unrouted(nn.Module):
    """Experts whose results are added, with no factor that says who was asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 48, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.qcompile.batched_linear(x.unsqueeze(0), self.up).relu().sum(0)


def test_experts_without_a_routing_see_all_tokens() -> None:
    model, x = Unrouted().eval(), inputs(90, 32)
    gm = graph_of(model, x)
    (expert,) = (site for site in find_sites(gm) if site.operand == "weight" and site.operator.groups)
    view = graph_view(gm, {expert: QuantizerConfig("int8", "per_channel")}, torch.float32)
    step = Gptq(GptqSettings(algorithm="gptq", scales="max", double=True))
    watched = step.watch(view)
    assert [statistic.memory(node) for node, statistic in watched.items()] == [16 * 3 * 32 * 32]
    program = torch.export.export(model, (x,))
    observe(gm, program, {node: [statistic] for node, statistic in watched.items()}, [x], progress=False)
    solved = step.solve(view, watched)[view.weights[0]]
    assert solved.codes is not None and solved.scale is not None
    for number, weight in enumerate(model.up.detach().numpy()):
        scale = solved.scale[number].double().expand(-1, 32).numpy()
        expected = paper(weight, x.double().numpy(), scale, "int8", 0.01, "block")
        np.testing.assert_array_equal(solved.codes[number].numpy(), expected)


def test_without_data_it_is_mse_and_says_so() -> None:
    model, x = nn.Linear(32, 16).eval(), inputs(columns=32)
    made = {}
    for algorithm in ("mse", "hessian_mse"):
        chosen = recipe("nvfp4", algorithm=algorithm)
        state = qcompile.calibrate(model, (x,), recipe=chosen, calibration=[x], progress=False)
        made[algorithm] = qcompile.quantize(model, (x,), recipe=chosen, calibration=state, dtype=torch.float32)
    a, b = (program.state_dict for program in made.values())
    assert a.keys() == b.keys() and all(torch.equal(a[n].float(), b[n].float()) for n in a)
    told = [notice for notice in record_of(made["hessian_mse"]).notices if "no calibration data for weights" in notice]
    assert told == ["no calibration data for weights: their scales are those of mse, not of hessian_mse"]


@pytest.mark.slow
def test_a_directory_has_no_data(tmp_path: Any) -> None:
    source = save(tiny("llama"), tmp_path / "source")
    chosen = recipe("nvfp4_weight_only", algorithm="gptq")
    with pytest.raises(CheckpointError, match="gptq needs calibration data: program = qcompile"):
        qcompile.save_checkpoint(source, tmp_path / "out", format="modelopt", recipe=chosen, progress=False)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 32, 3), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).mean((-1, -2)))


@pytest.mark.everyday(1)
@pytest.mark.parametrize("algorithm", ["gptq", "hessian_mse"])
def test_convolutions_are_left_to_mse(algorithm: str) -> None:
    x = torch.randn(4, 16, 8, 8)
    overrides = [f"calibration={{algorithm: {algorithm}}}", "convolutions=all"]
    chosen = qcompile.load_recipe("int8", overrides)
    program = qcompile.quantize(Convolutions().eval(), (x,), recipe=chosen, calibration=[x], progress=False)
    notices = " ".join(record_of(program).notices)
    assert "first.weight_quantizer" in notices and "second.weight_quantizer: their" not in notices


def test_the_view_keeps_its_notices() -> None:
    view = View([])
    view.of([], {}).notices.append("told")
    assert view.notices == ["told"]


class Tied(nn.Module):
    """One weight, two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


@pytest.mark.everyday(1)
@pytest.mark.parametrize("algorithm", ["hessian_mse", "gptq"])
@pytest.mark.parametrize("name", ["nvfp4_weight_only", "fp8_per_channel_per_token"])
def test_a_weight_that_two_layers_read_has_one_set_of_codes(algorithm: str, name: str) -> None:
    program = quantized(Tied(), [inputs(80, 32)], recipe(name, algorithm=algorithm), torch.float32)
    assert len(weights_of(program)) == 1 and sum("weight" in n and "scale" not in n for n in program.state_dict) == 1
