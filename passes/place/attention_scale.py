"""The attention scale moves in front of the query's quantizer."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, add_constant, argument, aten, calls, constant, is_call, shape
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.quantize.sites import SDPA


class PlaceAttentionScale(Pass):
    """Multiply the query by the attention scale before it is quantized, instead of the scores after.

    Before:
        y = sdpa(dequantize(quantize(q, s), s), k, v, scale=a)
    After:
        qa = mul(q, a)
        y = sdpa(dequantize(quantize(qa, s * a), s * a), k, v, scale=1.0)

    Requires: a query quantized per tensor with a constant scale.
    Ensures: the same codes but for the rounding of `q * a`; another user of the query's Q/DQ keeps its values.
    Declines when: the scale of the quantizer is not a constant scalar.
    Why: TensorRT's data-centre builds fuse FP8 attention with the scale in front of the first product, and its
        quantized-attention operator is emitted with a scale of 1.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, SDPA):
            query = node.args[0]
            if not is_call(query, DEQUANTIZE) or argument(node, "scale") == 1.0:
                continue
            assert isinstance(query, Node)
            codes, scale_node = query.args
            scale = constant(gm, scale_node)
            if scale is None or scale.ndim or not is_call(codes, QUANTIZE):
                self.decline("the query's scale is not a constant scalar", node)
                continue
            assert isinstance(codes, Node) and isinstance(scale_node, Node)
            self._rewrite(gm, node, codes, scale_node, scale)
            self.fire()

    def _rewrite(self, gm: GraphModule, node: Node, codes: Node, scale_node: Node, scale: torch.Tensor) -> None:
        factor = attention_scale(node)
        query = node.args[0]
        assert isinstance(query, Node)
        emit = Emitter(codes, like=codes)
        scaled = emit(aten.mul.Tensor, codes.args[0], factor)
        new_scale = add_constant(gm, str(scale_node.target), scale * factor, codes)
        emit = Emitter(node, like=query)
        new_codes = emit(QUANTIZE, scaled, new_scale, **codes.kwargs)
        node.update_arg(0, emit(DEQUANTIZE, new_codes, new_scale, **query.kwargs))
        node.update_kwarg("scale", 1.0)


def attention_scale(node: Node) -> float:
    """The factor that an SDPA call multiplies its scores by: 1/sqrt(head dimension) unless it says another."""
    scale = argument(node, "scale")
    assert isinstance(node.args[0], Node)
    return float(scale) if scale is not None else float(shape(node.args[0])[-1]) ** -0.5
