"""Models that are quantized already: what comes of them is what `quantize` makes of the float model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qcompile
from passes.formats import FP8, FP8_1X128, FP8_128X128, FP8_PER_TOKEN, NVFP4
from passes.graph import aten, calls
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from qcompile.errors import CaptureError
from qcompile.schemes.layer import QuantizedLinear, QuantizedWeight
from qcompile.schemes.scheme import Scheme


class Block(nn.Module):
    """Attention and an MLP; 160 is no multiple of 128."""

    def __init__(self, width: int = 160) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=b) for b in (True, False, True))
        self.o_proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (4, -1)).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o_proj(y)
        return x + self.down(nn.functional.gelu(self.up(x)))


X = torch.randn(2, 40, 160, generator=torch.Generator().manual_seed(0))
SCHEMES = {
    "fp8_gemm": Scheme(FP8, FP8),
    "fp8_per_channel_per_token": Scheme(FP8, FP8_PER_TOKEN, per_channel=True),
    "fp8_block": Scheme(FP8_128X128, FP8_1X128),
    "nvfp4": Scheme(NVFP4, NVFP4),
    "nvfp4_weight_only": Scheme(NVFP4),
}


def with_codes(model: Block, program: ExportedProgram, scheme: Scheme) -> Block:
    """`model` with the codes and scales of `program` in layers of their own."""
    state = program.state_dict
    two_levels = scheme.weight.scale is not None
    for name, linear in list(model.named_children()):
        assert isinstance(linear, nn.Linear)
        codes = QuantizedWeight(
            scheme,
            state[f"{name}.weight"].detach(),
            state[f"{name}.weight_{'block_' if two_levels else ''}scale"].detach(),
            state[f"{name}.weight_global_scale"] if two_levels else None,
            _input_scale(program, name).clone() if scheme.has_input_scale else None,
        )
        bias = None if linear.bias is None else linear.bias.detach()
        setattr(model, name, QuantizedLinear(codes, bias))
    return model


def _input_scale(program: ExportedProgram, name: str) -> Tensor:
    """The scale of a layer's input, which goes by the name of the first layer that reads it."""
    names = ("q_proj",) if name in ("k_proj", "v_proj") else (name,)
    (found,) = (v for k, v in program.state_dict.items() if k.startswith(f"{names[0]}.input_"))
    return found


@pytest.mark.everyday(1)
@pytest.mark.parametrize("recipe", SCHEMES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_with_codes_are_what_quantize_makes(recipe: str, dynamic: bool) -> None:
    torch.manual_seed(0)
    model = Block().eval()
    shapes: Any = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},) if dynamic else None
    straight = qcompile.quantize(
        model, (X,), recipe=recipe, calibration=[X], dynamic_shapes=shapes, dtype=torch.float32, progress=False
    )
    again = qcompile.import_quantized(
        with_codes(model, straight, SCHEMES[recipe]), (X,), dynamic_shapes=shapes, dtype=torch.float32
    )
    assert _operators(again) == _operators(straight)
    assert again.state_dict.keys() == straight.state_dict.keys()
    for name, tensor in straight.state_dict.items():
        assert torch.equal(_bytes(again.state_dict[name]), _bytes(tensor)), name
    assert torch.equal(again.module()(X), straight.module()(X))


def _operators(program: ExportedProgram) -> Counter[Any]:
    return Counter(node.target for node in program.graph.nodes if node.op == "call_function")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8) if tensor.ndim else tensor.detach().reshape(1)


class Attention(nn.Module):
    """Attention whose keys and values are in FP8, and its queries if `query` says so."""

    def __init__(self, *, query: bool) -> None:
        super().__init__()
        self.query = query
        self.register_buffer("s", torch.tensor(0.01))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def qdq(x: Tensor) -> Tensor:
            return DEQUANTIZE(QUANTIZE(x, self.s, format="fp8"), self.s, format="fp8", dtype=x.dtype)

        return nn.functional.scaled_dot_product_attention(qdq(q) if self.query else q, qdq(k), qdq(v))


QKV = tuple(torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))


def test_attention_gets_the_quantizer_of_its_softmax() -> None:
    program = qcompile.import_quantized(Attention(query=True), QKV)
    assert sum(1 for _ in calls(program.graph, ATTENTION)) == 1
    assert not any(calls(program.graph, aten.scaled_dot_product_attention.default))


def test_a_query_is_calibrated_where_only_keys_and_values_are_quantized() -> None:
    model = Attention(query=False)
    half = qcompile.import_quantized(model, QKV, dtype=torch.float32)
    assert not any(calls(half.graph, ATTENTION))
    program = qcompile.import_quantized(
        model, QKV, calibration=[QKV, tuple(2 * x for x in QKV)], dtype=torch.float32, progress=False
    )
    assert sum(1 for _ in calls(program.graph, ATTENTION)) == 1
    expected = 2 * QKV[0].abs().max() / 4 / 448  # the attention scale, 1 / 4, is in front of the quantizer
    (scale,) = (value for name, value in program.state_dict.items() if name.endswith("q_scale"))
    torch.testing.assert_close(scale, expected)
    torch.testing.assert_close(program.module()(*QKV), half.module()(*QKV), rtol=0.1, atol=0.05)


def test_what_is_not_quantized_is_an_error() -> None:
    with pytest.raises(qcompile.QCompileError, match="nothing in this model is quantized"):
        qcompile.import_quantized(Block(), (X,))
    with pytest.raises(CaptureError, match="example inputs"):
        qcompile.import_quantized(Block())
    with pytest.raises(qcompile.QCompileError, match="cannot compute in"):
        qcompile.import_quantized(with_float_dtype(), (X,), dtype=torch.float64)


def with_float_dtype() -> nn.Module:
    program = qcompile.quantize(Block().eval(), (X,), recipe="fp8_per_channel_per_token", progress=False)
    return with_codes(Block(), program, SCHEMES["fp8_per_channel_per_token"])


def test_quantize_points_to_import() -> None:
    with pytest.raises(qcompile.QCompileError, match="import_quantized"):
        qcompile.quantize(with_float_dtype(), (X,), recipe="fp8_per_channel_per_token", progress=False)


@pytest.mark.slow
def test_the_model_is_not_changed() -> None:
    model = with_float_dtype()
    before = {name: _bytes(tensor).clone() for name, tensor in model.state_dict().items()}
    program = qcompile.import_quantized(model, (X,))
    assert any(calls(program.graph, DYNAMIC_QUANTIZE))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(_bytes(tensor), before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.everyday(1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_of_the_model_leaves_codes_and_scales(dtype: torch.dtype) -> None:
    model = with_float_dtype()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(dtype)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            assert tensor.dtype == dtype
        else:
            assert tensor.dtype == before[name].dtype and torch.equal(_bytes(tensor), _bytes(before[name]))
