"""Weights in blocks that get a scale for each channel, activations one for each token."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.constants import constant
from passes.formats import FP8, FP8_1X128, FP8_PER_TOKEN
from passes.graph import calls
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE
from passes.legalize.block_to_channel import BlocksToPerChannel
from passes.legalize.measured_scales import MeasuredToConstant
from passes.quantize.insert import Quantizer
from passes.testing import DYNAMIC, count, declines, only_call, rewrites, run
from tests.passes.blocks import INPUT, Array, block_graph, error, in_blocks
from tests.passes.legalize.test_k_split import Experts, Shared
from tests.passes.support import insert

# one scale for a row instead of one for each block: both are FP8, which has a step of 1/8
TOLERANCE = {"rtol": 0.2, "atol": 0.2}


def per_channel(values: Array) -> Array:
    """What FP8 makes of `[..., N, K]` with a scale for each row: float64."""
    import ml_dtypes

    rows = values.astype(np.float32)
    scale = np.abs(rows).max(-1, keepdims=True) / np.float32(448)
    scale = np.where(scale > 0, scale, np.float32(1))
    return (rows / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale.astype(np.float64)


def weight_of(gm: torch.fx.GraphModule) -> Array:
    """The dequantized weight of the only layer."""
    (node,) = (n for n in calls(gm.graph, DEQUANTIZE) if constant(gm, n.args[0]) is not None)
    codes, scale = constant(gm, node.args[0]), constant(gm, node.args[1])
    assert codes is not None and scale is not None
    result: Array = codes.double().numpy() * scale.double().numpy()
    return result


@pytest.mark.parametrize("width", [256, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_codes_of_the_dequantized_blocks(width: int, bias: bool) -> None:
    module = nn.Linear(width, 200, bias=bias)
    gm = block_graph(module, torch.randn(4, width), dynamic_shapes=({0: DYNAMIC},))
    rewrites(BlocksToPerChannel, gm, torch.randn(6, width), **TOLERANCE)
    assert {n.kwargs["format"] for n in calls(gm.graph, DEQUANTIZE)} == {"fp8", "fp8_per_token"}
    assert set(gm.state_dict()) == {"weight", "weight_scale"} | ({"bias"} if bias else set())
    assert gm.get_parameter("weight").shape == (200, width)
    assert error(weight_of(gm), per_channel(in_blocks(module.weight.detach().numpy(), 128))) <= 1e-6
    MeasuredToConstant()(gm)
    assert count(gm, DYNAMIC_QUANTIZE) == 0


def test_layers_with_one_input_go_on_sharing_it_and_a_shared_weight_is_one() -> None:
    gm = block_graph(Shared(), torch.randn(4, 256))
    rewrites(BlocksToPerChannel, gm, torch.randn(4, 256), fired=3, **TOLERANCE)
    assert (count(gm, DYNAMIC_QUANTIZE), count(gm, DEQUANTIZE)) == (2, 4)


@pytest.mark.parametrize("experts", [1, 3], ids=["same rows", "own rows"])
def test_experts(experts: int) -> None:
    module = Experts()
    gm = block_graph(module, torch.randn(experts, 4, 256))
    rewrites(BlocksToPerChannel, gm, torch.randn(experts, 4, 256), **TOLERANCE)
    assert error(weight_of(gm), per_channel(in_blocks(module.weight.detach().numpy(), 128))) <= 1e-6


def test_codes_that_something_else_reads_stay() -> None:
    gm, x = block_graph(nn.Linear(256, 64), torch.randn(4, 256)), torch.randn(4, 256)
    (codes,) = (n for n in gm.graph.find_nodes(op="get_attr") if constant(gm, n).dtype is FP8.storage)  # type: ignore[union-attr]
    with gm.graph.inserting_before(gm.graph.output_node()):
        again = gm.graph.get_attr(str(codes.target))
    again.meta |= codes.meta
    gm.graph.output_node().args = ((*gm.graph.output_node().args[0], again),)  # type: ignore[misc]
    gm.recompile()
    before = run(gm, x)[1].clone()
    assert BlocksToPerChannel()(gm).modified
    assert torch.equal(run(gm, x)[1].view(torch.uint8), before.view(torch.uint8))


def test_weight_only() -> None:
    gm = block_graph(nn.Linear(256, 64), torch.randn(4, 256), activation=None)
    rewrites(BlocksToPerChannel, gm, torch.randn(4, 256), **TOLERANCE)
    assert only_call(gm, DEQUANTIZE).kwargs["format"] == FP8.name


def test_zero_rows_and_rows_that_half_precision_has_no_scale_for() -> None:
    module = nn.Linear(256, 4, bias=False).half()
    with torch.no_grad():
        module.weight[0] = 0
        module.weight[1] = 6e-8
    x = torch.randn(3, 256).half()
    gm = block_graph(module, x)
    BlocksToPerChannel()(gm)
    scale = only_weight_scale(gm)
    assert scale.dtype == torch.float16 and bool((scale > 0).all()) and float(scale[0]) == 1
    (got,) = run(gm, x)
    assert got.isfinite().all() and bool((got[:, 0] == 0).all())


def test_a_block_of_rows_that_half_precision_has_no_scale_for_is_finite() -> None:
    """Padding that training left near zero: amax / 448 is zero in float16, and codes would be NaN or the largest."""
    module = nn.Linear(256, 256, bias=False).half()
    with torch.no_grad():
        module.weight[128:] = 6e-8
    x = torch.randn(3, 256).half()
    gm = block_graph(module, x)
    (want,) = run(gm, x)
    BlocksToPerChannel()(gm)
    assert float(only_weight_scale(gm)[128:].min()) == torch.finfo(torch.float16).smallest_normal
    (got,) = run(gm, x)
    torch.testing.assert_close(got[:, 128:], want[:, 128:], rtol=0, atol=1e-4)


def only_weight_scale(gm: torch.fx.GraphModule) -> Tensor:
    (scale,) = (s for n in calls(gm.graph, DEQUANTIZE) if (s := constant(gm, n.args[1])) is not None)
    return scale


@pytest.mark.parametrize("quantizer", [Quantizer(FP8, torch.tensor(0.01)), Quantizer(FP8_PER_TOKEN, None)])
def test_a_form_that_would_be_miscompiled_is_never_left(quantizer: Quantizer) -> None:
    """A weight in blocks against an input with other scales, which a model of another tool can have."""
    gm = block_graph(nn.Linear(256, 64), torch.randn(4, 256), activation=quantizer)
    rewrites(partial(BlocksToPerChannel, everywhere=False), gm, torch.randn(4, 256), **TOLERANCE)
    assert FP8_1X128.name not in {n.kwargs["format"] for n in calls(gm.graph, DEQUANTIZE)}


@pytest.mark.parametrize("activation", [None, INPUT], ids=["weight-only", "both"])
def test_blocks_that_have_a_form_of_their_own_stay(activation: Quantizer | None) -> None:
    gm = block_graph(nn.Linear(256, 64), torch.randn(4, 256), activation=activation)
    assert declines(partial(BlocksToPerChannel, everywhere=False), gm) == []


def test_other_weights_stay() -> None:
    gm = block_graph(nn.Linear(256, 64), torch.randn(4, 256), weight=None, activation=None)
    insert(gm, {"weight": torch.tensor(0.01)})
    assert declines(BlocksToPerChannel, gm) == []


@settings(max_examples=10, deadline=None)
@given(width=st.integers(1, 300), columns=st.integers(1, 300))
def test_any_shape(width: int, columns: int) -> None:
    module = nn.Linear(width, columns)
    gm = block_graph(module, torch.randn(2, width))
    BlocksToPerChannel()(gm)
    assert error(weight_of(gm), per_channel(in_blocks(module.weight.detach().numpy(), 128))) <= 1e-6
