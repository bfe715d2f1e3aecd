"""`svdquant`: the parts that the paper's formulas give, and the rest through every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import qcompile
from qcompile.algorithms.low_rank import largest_part
from qcompile.algorithms.svdquant import Squares
from qcompile.errors import CalibrationError, RecipeError
from qcompile.report.program import ProgramReport

WIDTH = 64
X = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, WIDTH)


class Net(nn.Module):
    """Two layers read one tensor; one has a weight of zeros."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.zeros = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.zeros.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.zeros(x) + self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


def recipe(rank: int = 4, name: str = "nvfp4", behind: str = "", **settings: Any) -> qcompile.Recipe:
    own = "".join(f", {key}: {value}" for key, value in settings.items())
    return qcompile.load_recipe(
        name, [f"calibration=[{{algorithm: svdquant, rank: {rank}{own}}}{behind}]", "convolutions=all"]
    )


def quantized(
    chosen: qcompile.Recipe, model: nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> ExportedProgram:
    return qcompile.quantize(model or Net().eval(), (X,), recipe=chosen, calibration=[X], dtype=dtype, progress=False)


def product(program: ExportedProgram, *layers: str) -> np.ndarray:
    """The low-rank part of the weights of `layers`, one below the other."""
    tensors = program.state_dict
    down = tensors[f"{'+'.join(layers)}.svdquant_lora_a"].double().numpy()
    return np.concatenate([tensors[f"{layer}.svdquant_lora_b"].double().numpy() for layer in layers]) @ down


@pytest.mark.parametrize("weighting", ["inputs", pytest.param("none", marks=pytest.mark.slow)])
def test_the_part_is_the_truncated_decomposition_of_the_weighted_weights(weighting: str) -> None:
    model = Net().eval()
    program = quantized(recipe(weighting=weighting, iterations=0), model)
    weights = np.concatenate([layer.weight.detach().double().numpy() for layer in (model.gate_proj, model.up_proj)])
    columns = np.sqrt(np.mean(X.double().numpy() ** 2, axis=0)) if weighting == "inputs" else np.ones(WIDTH)
    s = np.linalg.svd(weights * columns, compute_uv=False)
    left = (weights - product(program, "gate_proj", "up_proj")) * columns
    least = (s[8:] ** 2).sum()  # Eckart-Young; twice the rank, as two layers share it
    assert least * (1 - 1e-6) <= (left**2).sum() <= least * 1.002


def errors(iterations: int) -> float:
    model = Net().eval()
    program = quantized(recipe(iterations=iterations, rank=8), model)
    with torch.no_grad():
        return float((program.module()(X) - model(X)).norm() / model(X).norm())


def test_iterations_come_nearer() -> None:
    plain = qcompile.quantize(Net().eval(), (X,), recipe="nvfp4", calibration=[X], dtype=torch.float32, progress=False)
    with torch.no_grad():
        without = float((plain.module()(X) - Net()(X)).norm() / Net()(X).norm())
    first, third = errors(0), errors(3)
    assert third < 0.95 * first < first < 0.9 * without


def test_what_is_stored_is_what_the_rest_was_taken_from(tmp_path: Path) -> None:
    """In half, too: the rest makes up for the rounding of the factors. A saved program keeps all of it."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval()
    chosen = recipe(rank=8, name="fp8_gemm")  # 8 bits, so that what is lost in the sum would show
    program = quantized(chosen, model, torch.float16)
    tensors = program.state_dict
    rest = tensors["0.weight"].double() * tensors["0.weight_scale"].double()
    off = (rest.numpy() + product(program, "0")) - model[0].weight.detach().double().numpy()
    assert np.abs(off).max() <= 16 * float(tensors["0.weight_scale"]) * 1.01  # half a step of the largest numbers
    torch.export.save(program, tmp_path / "p.pt2")
    again = torch.export.load(tmp_path / "p.pt2")
    assert torch.equal(again.module()(X), program.module()(X))
    reports = [ProgramReport.of(one) for one in (program, again)]
    assert reports[0] == reports[1]
    assert any("1 weights have a low-rank part" in notice and "2,048 bytes" in notice for notice in reports[0].notices)
    (cost,) = reports[0].low_rank
    assert (cost.modules, cost.rank, cost.bytes, cost.weight_bytes) == (["0"], 8, 8 * 128 * 2, 64 * 64 * 2)
    assert reports[0].unquantized == {"0.svdquant_lora_a": "low_rank", "0.svdquant_lora_b": "low_rank"}
    assert reports[0].coverage == {"linear": (1, 1)} and all("low-rank part" in w for w in reports[0].reasons.values())


def test_onnx_runtime_gives_what_the_program_gives(tmp_path: Path) -> None:
    program = quantized(recipe(name="fp8_per_channel_per_token", weighting="none"))
    assert all(check.passed for check in qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable").checks)
    (found,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": X.numpy()})
    np.testing.assert_allclose(found, program.module()(X).detach().numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_compiled_model_gives_what_the_program_gives() -> None:
    model, chosen = Net().eval(), recipe(name="fp8_per_channel_per_token", weighting="none")
    wanted = quantized(chosen, model).module()(X).detach()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="qcompile", options={"recipe": chosen, "target": "eager"})(X)
    torch.testing.assert_close(compiled, wanted, rtol=1e-5, atol=1e-5)
    program = quantized(recipe(), model)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(program.module(), backend="qcompile")(X)
    torch.testing.assert_close(compiled, program.module()(X).detach(), rtol=1e-4, atol=1e-4)


def test_steps_behind_see_the_rest() -> None:
    alone, behind = quantized(recipe()).state_dict, quantized(recipe(behind=", {algorithm: mse}")).state_dict
    assert torch.equal(alone["down_proj.svdquant_lora_b"], behind["down_proj.svdquant_lora_b"])
    assert not torch.equal(
        alone["down_proj.weight_block_scale"].float(), behind["down_proj.weight_block_scale"].float()
    )
    with pytest.raises(RecipeError, match=r"calibration\[1\]: svdquant changes the graph"):
        quantized(qcompile.load_recipe("nvfp4", ["calibration=[{algorithm: mse}, {algorithm: svdquant}]"]))


class Odd(nn.Module):
    """An output that is quantized, experts, a layer beside a layer whose weight it has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.b.weight = self.a.weight
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.a(x) + self.b(x)) + self.b(x.relu())
        return y + self.conv(y[..., None].expand(-1, -1, 3))[..., 0]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.zeros = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        nn.init.zeros_(self.zeros.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x) + self.zeros(x)


def test_a_rank_is_halved_until_it_pays() -> None:
    costs = ProgramReport.of(quantized(recipe(rank=500, iterations=0))).low_rank
    assert [(cost.modules, cost.rank) for cost in costs] == [(["gate_proj", "up_proj"], 2 * 8), (["down_proj"], 24)]
    assert all(cost.bytes < cost.weight_bytes for cost in costs)


def test_what_gets_no_part_is_listed_with_the_reason() -> None:
    program = quantized(recipe(name="int8", rank=64), Small().eval())
    report = ProgramReport.of(program)
    reasons = {decline.module: decline.reason for decline in report.declined}
    assert reasons["zeros"] == "its weight is all zeros"
    assert "a low-rank part of rank 8 takes" in reasons["down"]
    assert report.coverage == {"linear": (2, 2)} and not report.low_rank
    assert any("no linear layer gets a low-rank part" in notice for notice in report.notices)
    odd = ProgramReport.of(quantized(recipe(), Odd().eval()))
    reasons = {decline.module: decline.reason for decline in odd.declined}
    assert "read by layers of another group" in reasons["a"] and "for linear layers" in reasons["conv"]
    assert [cost.modules for cost in odd.low_rank] == [["out"]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error(value: float) -> None:
    model = Net().eval()
    with torch.no_grad():
        model.down_proj.weight[3, 5] = value
    with pytest.raises(CalibrationError, match=r"down_proj.*NaN or infinity"):
        quantized(recipe(), model)


def test_channels_that_were_zero_and_rows_that_were_equal() -> None:
    model, x = Net().eval(), X[:1].repeat(32, 1)
    x[:, ::2] = 0
    chosen = recipe(name="nvfp4_weight_only")  # ranges of activations of such data would hold for nothing else
    program = qcompile.quantize(model, (x,), recipe=chosen, calibration=[x], dtype=torch.float32, progress=False)
    assert all(tensor.float().isfinite().all() for tensor in program.state_dict.values())
    with torch.no_grad():
        assert float((program.module()(X) - model(X)).norm() / model(X).norm()) < 0.2  # other data


def test_a_nan_in_one_batch_is_an_error_and_statistics_merge() -> None:
    bad = X.clone()
    bad[3, 5] = float("nan")
    options: dict[str, Any] = {"recipe": recipe(name="nvfp4_weight_only"), "progress": False}
    with pytest.raises(CalibrationError, match=r"gate_proj.weight_quantizer: calibration found nan in what the layer"):
        qcompile.quantize(Net().eval(), (X,), calibration=[X, bad], **options)
    first, second, both = Squares(), Squares(), Squares()
    first.update(X, (), 1.0)
    second.update(X[:4] * 2, (), 0.5)
    for rows, weight in ((X, 1.0), (X[:4] * 2, 0.5)):
        both.update(rows, (), weight)
    first.merge(second)
    assert all(torch.equal(tensor, both.tensors()[name]) for name, tensor in first.tensors().items())
    assert float(both.count) == len(X) + 2


def test_a_part_that_leaves_half_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval()
    with torch.no_grad():
        model[0].weight.fill_(6e4)
    with pytest.raises(CalibrationError, match="low-rank part of the weight leaves"):
        quantized(recipe(), model, torch.float16)


def test_data_is_asked_for_where_it_is_needed(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="svdquant needs calibration data"):
        qcompile.quantize(Net().eval(), (X,), recipe=recipe(name="nvfp4_weight_only"))
    qcompile.quantize(Net().eval(), (X,), recipe=recipe(name="nvfp4_weight_only", weighting="none"))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 200, 8), (200, 96, 8), (40, 40, 16), (8, 8, 8)])
def test_the_largest_part_is_nearly_the_best(rows: int, columns: int, rank: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    up, down = largest_part(matrix, rank)
    s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    off = float((matrix - up @ down).double().square().sum())
    assert off <= 1.01 * float((s[rank:] ** 2).sum()) + 1e-6
    again = largest_part(matrix, rank)
    assert torch.equal(again[0], up) and torch.equal(again[1], down)
    start = largest_part(matrix * 1.01 + 0.01, rank)[1]
    warm = largest_part(matrix, rank, start)
    assert float((matrix - warm[0] @ warm[1]).double().square().sum()) <= 1.02 * off + 1e-6
