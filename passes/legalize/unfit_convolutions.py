"""Quantized convolutions that TensorRT has no kernel for."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.capabilities import CONVOLUTIONS, is_plain_depthwise
from passes.constants import delete_constant, evaluate_constant, is_read_beside, replace_with_constant
from passes.formats import Format
from passes.graph import argument, aten, calls, dtype, shape
from passes.ir import dequantize
from passes.operators import TRANSPOSED
from passes.reading import Operand

__all__ = ["LeaveUnfitConvolutions", "unfit_convolution"]


class LeaveUnfitConvolutions(Pass):
    """Take the quantizers from a convolution that would be computed in half precision all the same.

    Before:
        y = convolution(dequantize(quantize(x, s), s), dequantize(w_codes, t), bias, ...)     # FP8, 7 x 7
    After:
        y = convolution(x, w, bias, ...)                                                      # w = w_codes * t

    Requires: weights as codes.
    Ensures: the convolution is computed from the values before the quantizer of its input, which other users keep, and
        from what the codes of its weight stand for. Each is listed as declined, with what no kernel takes.
    Declines when: nothing; a weight or input that is quantized alone stays, as it was asked for.
    Why: quantized and not taken it is a kernel more than in half precision. `quantize` leaves such layers by itself,
        and other tools do not know of them.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.convolution.default):
            x, weight = (Operand.read(operand) for operand in node.args[:2])
            if x is None or x.source is None or weight is None or not weight.is_constant or weight.block_scales:
                continue
            if (reason := unfit_convolution(node, weight.format)) is not None:
                self.decline(f"not quantized for TensorRT: {reason}", node)
                node.update_arg(0, x.source)
                _store_values(gm, node, weight)
                self.fire()


def unfit_convolution(call: Node, fmt: Format) -> str | None:
    """Why no target computes the convolution `call` on codes of `fmt`; None for one that some does."""
    if argument(call, "transposed"):
        return TRANSPOSED.refusal
    if fmt.name not in CONVOLUTIONS:
        return f"no target convolves {fmt.name}"
    weight = call.args[1]
    assert isinstance(weight, Node)
    steps = (*argument(call, "stride"), *argument(call, "dilation"))
    depthwise = is_plain_depthwise(shape(weight), argument(call, "groups"), steps)
    return CONVOLUTIONS[fmt.name].unfit(shape(weight)[2:], depthwise)


def _store_values(gm: GraphModule, node: Node, weight: Operand) -> None:
    """Let `node` read the values of `weight`; codes and scales stay for other readers only."""
    codes, scale = weight.codes, weight.scale
    values = dequantize(
        evaluate_constant(gm, codes), evaluate_constant(gm, scale), format=weight.format.name, dtype=dtype(weight.node)
    )
    weight.node.update_arg(1, None)  # so that the codes alone name the values
    unread = not scale.users and not is_read_beside(gm, str(scale.target), ())
    replace_with_constant(gm, weight.node, values)
    if unread:
        name = str(scale.target)
        gm.graph.erase_node(scale)
        delete_constant(gm, name)
