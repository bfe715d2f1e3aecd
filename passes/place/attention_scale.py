"""The attention scale moves in front of the query's quantizer."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant, constant
from passes.graph import Emitter, argument, aten, calls, is_call
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.sdpa import SDPA, attention_scale


class PlaceAttentionScale(Pass):
    """Multiply the query by the attention scale before it is quantized, instead of the scores after.

    Before:
        y = sdpa(q, k, v, scale=a)                                  # one that will be quantized
        y = sdpa(dequantize(quantize(q, s), s), k, v, scale=a)      # one that is
    After:
        y = sdpa(mul(q, a), k, v, scale=1.0)
        y = sdpa(dequantize(quantize(mul(q, a), s * a), s * a), k, v, scale=1.0)

    Requires: a query that is quantized already is so per tensor, with a constant scale.
    Ensures: the same values and codes but for the rounding of `q * a`; another user of the query keeps its values.
    Declines when: the scale of the quantizer is not a constant scalar, or the attention scale is not positive.
    Why: TensorRT's data-centre builds fuse FP8 attention with the scale in front of the first product, and its
        quantized-attention operator is emitted with a scale of 1.
    """

    def __init__(self, planned: Collection[Node] = ()) -> None:
        """`planned` holds the attentions whose query is not quantized yet, but will be."""
        super().__init__()
        self.planned = planned

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, SDPA):
            query = node.args[0]
            assert isinstance(query, Node)
            if argument(node, "scale") == 1.0 or not (node in self.planned or is_call(query, DEQUANTIZE)):
                continue
            if attention_scale(node) <= 0:
                self.decline("the attention scale is not positive, as the scale of a quantizer has to be", node)
                continue
            if node in self.planned:
                node.update_arg(0, Emitter(node)(aten.mul.Tensor, query, attention_scale(node)))
            elif not self._rewrite_quantized(gm, node, query):
                self.decline("the query's scale is not a constant scalar", node)
                continue
            node.update_kwarg("scale", 1.0)
            self.fire()

    def _rewrite_quantized(self, gm: GraphModule, node: Node, query: Node) -> bool:
        codes, scale_node = query.args
        scale = constant(gm, scale_node)
        if scale is None or scale.ndim or not is_call(codes, QUANTIZE):
            return False
        assert isinstance(codes, Node) and isinstance(scale_node, Node)
        factor = attention_scale(node)
        before = Emitter(codes)
        scaled = before(aten.mul.Tensor, codes.args[0], factor)
        new_scale = add_constant(gm, str(scale_node.target), scale * factor, codes)
        emit = Emitter(node, like=query)
        new_codes = emit(QUANTIZE, scaled, new_scale, **codes.kwargs)
        node.update_arg(0, emit(DEQUANTIZE, new_codes, new_scale, **query.kwargs))
        return True
