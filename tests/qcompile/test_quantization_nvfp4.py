"""quantize to NVFP4: what is quantized, under which global scales, and mixed with FP8 attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qcompile
from passes.hadamard import hadamard
from passes.ir import ATTENTION, DYNAMIC_QUANTIZE
from passes.program import unlift
from qcompile.errors import CalibrationError, QCompileError
from qcompile.report.coverage import coverage, quantized_modules
from qcompile.report.record import record_of
from tests.nvfp4 import bits, oracle, rounded, unpacked

X = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Attention and an MLP, and a head that recipes leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.o_proj, self.up, self.down, self.lm_head = (
            nn.Linear(32, 32),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
            nn.Linear(32, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (p(h).reshape(*x.shape[:2], 2, 16).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return self.lm_head(x + self.down(F.gelu(self.up(x))))


def quantize(model: nn.Module, *args: Tensor, **options: Any) -> ExportedProgram:
    return qcompile.quantize(model.eval(), args, **{"calibration": [args], "progress": False, **options})


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "up", "down")


@pytest.fixture(scope="module")
def model() -> Block:
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def program(model: Block) -> ExportedProgram:
    recipe = qcompile.load_recipe("nvfp4_fp8_attention", ["calibration.algorithm=max"])  # codes that an oracle can tell
    return quantize(model, X, recipe=recipe, dtype=torch.float32)


def test_linears_are_nvfp4_and_attention_is_fp8(program: ExportedProgram) -> None:
    found, left = quantized_modules(unlift(program))
    assert found == {**dict.fromkeys(LINEARS, "nvfp4"), "norm": "nvfp4", "": "fp8"}  # the norm: all read it in codes
    assert left == {"lm_head": "linear"}
    assert coverage(unlift(program), left) == {"linear": (6, 7), "attention": (1, 1)}
    assert sum(node.target is ATTENTION for node in program.graph.nodes) == 1
    # the norm's output once for q, k and v; o, up, down
    assert sum(node.target is DYNAMIC_QUANTIZE for node in program.graph.nodes) == 4
    assert record_of(program).declined == []


def test_weights_only(model: Block) -> None:
    recipe = qcompile.load_recipe("nvfp4_weight_only", ["calibration.algorithm=max"])
    program = quantize(model, X, recipe=recipe, calibration=None)
    assert quantized_modules(unlift(program))[0] == dict.fromkeys(LINEARS, "nvfp4_weight_only")
    assert not any(node.target is DYNAMIC_QUANTIZE for node in program.graph.nodes)


def test_bytes_and_scales_of_weights_are_those_of_the_oracle(model: Block, program: ExportedProgram) -> None:
    state = program.state_dict
    shared = max(getattr(model, name).weight.abs().max() for name in ("q_proj", "k_proj", "v_proj")) / 2688
    for name in LINEARS:
        weight = getattr(model, name).weight.detach()
        g = state[f"{name}.weight_global_scale"]
        assert (g.dtype, g.shape) == (torch.float32, ())
        assert torch.equal(g, shared if name[0] in "qkv" else weight.abs().max() / 2688)
        codes, scales = oracle(weight.numpy(), g)
        np.testing.assert_array_equal(unpacked(state[f"{name}.weight"]), codes)
        np.testing.assert_array_equal(bits(state[f"{name}.weight_block_scale"]), bits(scales))


@pytest.mark.everyday(1)
@pytest.mark.parametrize("width", [64, 96, 176])
def test_bytes_of_a_rotated_weight_are_those_of_its_rotation_in_float32(width: int) -> None:
    layer = nn.Linear(width, 8, bias=False).half()
    recipe = qcompile.load_recipe("nvfp4_fast", ["rules[format=nvfp4].rotate=true"])
    state = quantize(layer, torch.randn(4, width).half(), recipe=recipe).state_dict
    weight = hadamard(layer.weight)
    codes, scales = oracle(weight.numpy(), weight.abs().max() / 2688)
    assert torch.equal(state["weight_global_scale"], weight.abs().max() / 2688)
    np.testing.assert_array_equal(unpacked(state["weight"]), codes)
    np.testing.assert_array_equal(bits(state["weight_block_scale"]), bits(scales))


def test_the_global_scale_of_an_input_is_calibrated(model: Block, program: ExportedProgram) -> None:
    with torch.no_grad():
        amax = model.norm(X).abs().max()
    assert torch.equal(program.state_dict["q_proj.input_global_scale"], amax / 2688)


def test_a_global_scale_can_be_a_power_of_two(model: Block) -> None:
    recipe = qcompile.load_recipe("nvfp4_fast", ["calibration.power_of_two=true"])
    state = quantize(model, X, recipe=recipe).state_dict
    scales = [tensor for name, tensor in state.items() if name.endswith("global_scale")]
    assert len(scales) == 10
    assert all(torch.log2(scale) == torch.log2(scale).round() for scale in scales)


def test_activations_under_a_global_scale_need_calibration(model: Block) -> None:
    with pytest.raises(CalibrationError, match=r"q_proj.input_quantizer.* need calibration data"):
        quantize(model, X, recipe="nvfp4_fast", calibration=None)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rotate", [False, True])
def test_values_are_near_the_model(model: Block, dtype: torch.dtype | None, rotate: bool) -> None:
    recipe = qcompile.load_recipe("nvfp4_fp8_attention", ["rules[format=nvfp4].rotate=true"] if rotate else [])
    program = quantize(model, X, recipe=recipe, dtype=dtype, dynamic_shapes=({0: Dim("batch", max=8)},))
    x = torch.randn(3, 32, 32)
    with torch.no_grad():
        found, expected = program.module()(x), model(x)
    assert found.dtype is torch.float32
    assert 0.01 < (found - expected).norm() / expected.norm() < 0.3
    floats = {n: t.dtype for n, t in program.state_dict.items() if "block_scale" in n or "global_scale" in n}
    assert set(floats.values()) == {torch.float8_e4m3fn, torch.float32}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision(half: torch.dtype) -> None:
    layer = nn.Linear(32, 16, bias=False).to(half)
    x = torch.randn(4, 32, dtype=half)
    program = quantize(layer, x, recipe="nvfp4_fast")
    state = program.state_dict
    operands = [
        rounded(x.float().numpy(), state["input_global_scale"]),
        rounded(layer.weight.detach().float().numpy(), state["weight_global_scale"]),
    ]
    expected = F.linear(*(torch.from_numpy(value).to(half) for value in operands))
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_width_that_16_does_not_divide_is_filled_up_with_zeros(half: torch.dtype) -> None:
    layer = nn.Linear(100, 16, bias=False).to(half)
    x = torch.randn(4, 100, dtype=half)
    program = quantize(layer, x, recipe="nvfp4_fast")
    assert quantized_modules(unlift(program)) == ({"": "nvfp4"}, {}) and not record_of(program).declined
    state, operands = program.state_dict, []
    for operand, name in ((x, "input"), (layer.weight.detach(), "weight")):
        padded = np.pad(operand.float().numpy(), ((0, 0), (0, 12)))
        operands.append(torch.from_numpy(rounded(padded, state[f"{name}_global_scale"])).to(half))
    torch.testing.assert_close(program.module()(x), F.linear(*operands), rtol=0, atol=0)


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_weight_only"])
@pytest.mark.parametrize("rotate", [False, True])
def test_padding_takes_nothing_of_the_accuracy(recipe: str, rotate: bool) -> None:
    """The same error as that of a width that 16 divides; rotated in blocks of the whole width, zeros and all."""
    errors = {}
    options = ["rules[format=nvfp4].rotate=true"] if rotate and recipe == "nvfp4" else []
    for width in (688, 682):
        torch.manual_seed(0)
        layer, x = nn.Linear(width, 64), torch.randn(32, width)
        program = quantize(layer, x, recipe=qcompile.load_recipe(recipe, options), dtype=torch.float32)
        with torch.no_grad():
            errors[width] = float((program.module()(x) - layer(x)).norm() / layer(x).norm())
        if options:
            assert any(name.startswith("hadamard") for name in program.state_dict)
    assert errors[682] <= 1.05 * errors[688]


@pytest.mark.parametrize("rotate", [False, True])
def test_a_width_that_16_does_not_divide_is_left_with_a_reason(rotate: bool) -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 4))
    recipe = qcompile.load_recipe("nvfp4_fast", ["rules[format=nvfp4].rotate=true"] if rotate else [])
    program = quantize(model, torch.randn(5, 24), recipe=recipe)
    assert quantized_modules(unlift(program)) == ({"1": "nvfp4"}, {"0": "linear"})
    reasons = {(decline.module, decline.reason) for decline in record_of(program).declined}
    assert reasons == {("0", "nvfp4 has blocks of 16 elements, and the reduction axis has 24")}
    rotations = [name for name in program.state_dict if name.startswith("hadamard")]
    assert rotations == (["hadamard_32"] if rotate else [])  # and none for the layer that stays


def test_that_every_layer_was_declined_is_said(caplog: pytest.LogCaptureFixture) -> None:
    program = quantize(nn.Sequential(nn.Linear(24, 36), nn.Linear(36, 4)), torch.randn(5, 24), recipe="nvfp4_fast")
    assert quantized_modules(unlift(program))[0] == {}
    (notice,) = (notice for notice in record_of(program).notices if notice.startswith("nothing of this model"))
    assert "0: nvfp4 has blocks of 16 elements, and the reduction axis has 24" in notice and "1: nvfp4" in notice
    assert notice in caplog.messages


def test_zeros_give_zeros() -> None:
    """A weight of zeros has the global scale 1; an input that was zero in calibration has no range."""
    layer = nn.Linear(32, 16)
    nn.init.zeros_(layer.weight)
    x = torch.randn(4, 32)
    program = quantize(layer, x, recipe="nvfp4_fast", dtype=torch.float32)
    assert program.state_dict["weight_global_scale"].item() == 1.0
    for inputs in (x, torch.zeros(4, 32)):
        torch.testing.assert_close(program.module()(inputs), layer.bias.detach().expand(4, 16), rtol=0, atol=0)
    unseen = quantize(layer, torch.zeros(4, 32), recipe="nvfp4_fast", dtype=torch.float32)
    assert not any("global_scale" in name for name in unseen.state_dict)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    layer = nn.Sequential(nn.Linear(32, 16))
    layer[0].weight.data[3, 5] = bad
    with pytest.raises(CalibrationError, match=r"0\.weight_quantizer: the weight holds NaN or infinity"):
        quantize(layer, torch.randn(4, 32), recipe="nvfp4_fast")


def test_nvfp4_goes_with_nvfp4() -> None:
    """TensorRT crashes on an FP8 weight with an NVFP4 input, and computes the reverse in half precision."""
    recipe = {
        "metadata": {"name": "mine", "description": "mixed within a layer"},
        "rules": [
            {"quantizer": "*.weight_quantizer", "format": "fp8"},
            {"quantizer": "*.input_quantizer", "format": "nvfp4"},
        ],
    }
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(
        QCompileError, match=r"^0: no target multiplies a weight in fp8 per_tensor with an input in nvfp4"
    ):
        quantize(model, torch.randn(5, 32), recipe=recipe)


def test_weights_that_half_precision_cannot_hold() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.mul_(1e7)
    with pytest.raises(
        QCompileError, match=r"0\.weight_quantizer: the largest weight is 1\.\d+e\+06, and torch.float16 ends at 65504"
    ):
        quantize(model, torch.randn(5, 32), recipe="nvfp4_fast")
    quantize(model, torch.randn(5, 32), recipe="nvfp4_fast", dtype=torch.bfloat16)


def test_products_that_are_no_linear_layers_are_listed() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.up = nn.Parameter(torch.randn(32, 48)), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bd,df->bf", self.up(x), self.w)

    quantized, unquantized = quantized_modules(unlift(quantize(Products(), torch.randn(5, 32), recipe="nvfp4_fast")))
    assert quantized.pop("up") == "nvfp4"
    assert (quantized or unquantized) and set(unquantized.values()) <= {"linear"}


@pytest.mark.slow
def test_a_program_with_parallel_layers_is_saved_and_loaded(tmp_path: Path) -> None:
    class GateUp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(32, 64), nn.Linear(32, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate_proj(x) * self.up_proj(x)

    x = torch.randn(5, 32)
    program = quantize(GateUp(), x, recipe="nvfp4_fast", dtype=torch.float32)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert torch.equal(loaded.module()(x), program.module()(x))
    qcompile.export_onnx(program, tmp_path / "a.onnx")
    qcompile.export_onnx(loaded, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
