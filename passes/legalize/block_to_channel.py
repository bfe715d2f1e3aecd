"""FP8 weights in blocks get one scale for each channel instead."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.blocks import block_weight, measured_blocks, scale_rows
from passes.constants import add_constant, constant, delete_constant, evaluate_constant, root_constants
from passes.formats import FP8, FP8_PER_TOKEN
from passes.graph import Emitter, aten, calls, dtype, is_call
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, dequantize, quantize
from passes.pairs import measured_pair

_ROWS = 1024  # are requantized at a time, so that the float32 values of a whole weight are nowhere


class BlocksToPerChannel(Pass):
    """Quantize weights in blocks once more, per channel, and their activations per token.

    Before:
        c, s = dynamic_quantize(x, format=fp8_1x128)
        y = linear(dequantize(c, s), dequantize(w, t[N/128,K/128], format=fp8_128x128), bias)
    After:
        c, s = dynamic_quantize(x, format=fp8_per_token)
        y = linear(dequantize(c, s), dequantize(v, u[N,1], format=fp8), bias)

    Requires: `FoldWeights` ran; parallel layers are not merged yet.
    Ensures: codes of `w * t` in float32 by the scale amax / 448 of each row, rounded to the compute dtype.
    Declines when: never. With `everywhere=False` it looks only at layers whose input is quantized in another way than
        in blocks, which another tool's model can hold.
    Why: it is an FP8 GEMM with no product for each block to write, for the accuracy of a scale for each channel.
        TensorRT miscompiles a weight in blocks against an activation with one scale, so that form is never left.
    """

    def __init__(self, everywhere: bool = True) -> None:
        super().__init__()
        self.everywhere = everywhere

    def rewrite(self, gm: GraphModule) -> None:
        readers: dict[Node, list[Node]] = {}
        for node in calls(gm.graph, aten.linear.default, BATCHED_LINEAR):
            if (weight := block_weight(node)) is not None and (self.everywhere or _is_quantized_otherwise(node)):
                readers.setdefault(weight, []).append(node)
        tokens: dict[Node, Node] = {}
        for weight, linears in readers.items():
            _requantize(gm, weight, linears)
            for linear in linears:
                source = linear.args[0]
                assert isinstance(source, Node)
                if (dynamic := measured_blocks(source)) is not None:
                    if source not in tokens:
                        x = dynamic.args[0]
                        assert isinstance(x, Node)
                        tokens[source] = measured_pair(x, FP8_PER_TOKEN, Emitter(dynamic))
                    linear.update_arg(0, tokens[source])
                self.fire()


def _is_quantized_otherwise(linear: Node) -> bool:
    return is_call(linear.args[0], DEQUANTIZE) and measured_blocks(linear.args[0]) is None


def _requantize(gm: GraphModule, weight: Node, linears: list[Node]) -> None:
    codes, compute = weight.args[0], dtype(weight)
    assert isinstance(codes, Node)
    new, scale = _per_channel(evaluate_constant(gm, codes), scale_rows(gm, weight), compute)
    name = str(root_constants(codes)[0].target)
    for linear in linears:
        linear.update_arg(1, None)
    stack = Emitter(linears[0], like=weight)
    if not weight.users:
        _drop(gm, weight)
    stored = add_constant(gm, name, torch.nn.Parameter(new, requires_grad=False), linears[0])
    scales = add_constant(gm, f"{name}_scale", scale, linears[0])
    channelwise = stack(DEQUANTIZE, stored, scales, format=FP8.name, dtype=compute)
    for linear in linears:
        linear.update_arg(1, channelwise)


def _drop(gm: GraphModule, weight: Node) -> None:
    """Erase a dequantize that nothing reads, with its constants: what takes their place takes their names."""
    constants = [argument for argument in weight.all_input_nodes if constant(gm, argument) is not None]
    weight.graph.erase_node(weight)
    for node in constants:
        if not node.users:
            weight.graph.erase_node(node)
            if not any(n.target == node.target for n in gm.graph.find_nodes(op="get_attr")):
                delete_constant(gm, str(node.target))


def _per_channel(codes: torch.Tensor, scale: torch.Tensor, compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[..., N, K]` and scales `[..., N, 1]` in `compute`, of codes and scales `[..., N, ceil(K / 128)]`."""
    flat_codes, flat_scale = codes.flatten(0, -2), scale.flatten(0, -2)
    new = torch.empty_like(flat_codes)
    channel = torch.empty((flat_codes.shape[0], 1), dtype=compute)
    for start in range(0, flat_codes.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        values = dequantize(flat_codes[rows], flat_scale[rows], format="fp8_1x128", dtype=torch.float32)
        amax = values.abs().amax(-1, keepdim=True)
        own = torch.where(amax > 0, amax / FP8.max, 1.0).to(compute)
        channel[rows] = torch.where(own > 0, own, torch.finfo(compute).smallest_normal)
        new[rows] = quantize(values, channel[rows], format=FP8.name)
    return new.view(codes.shape), channel.view(*codes.shape[:-1], 1)
