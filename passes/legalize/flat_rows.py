"""NVFP4 linear layers read a matrix."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.formats import get_format
from passes.graph import Emitter, aten, calls, fake_call, fake_mode, is_call, shape
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE


class FlattenRows(Pass):
    """Quantize with blocks measured at run time on a matrix, whatever the batch axes are.

    Before:
        c, b = dynamic_quantize(x[B,S,K], g)
        y = linear(dequantize(c, dequantize(b, g)), w, bias)
    After:
        c, b = dynamic_quantize(reshape(x, [-1,K]), g)
        y = reshape(linear(dequantize(c, dequantize(b, g)), w, bias), [B,S,N])

    Requires: linear layers (before `StoreWeightsTransposed`), parallel ones merged.
    Ensures: the same values; the reshapes move nothing.
    Declines when: something else than linear layers reads the dequantized tensor and it has other than 2 or 3 axes.
    Why: TensorRT's operator takes 2 or 3 axes only, and of 3 with a batch of more than one the TensorRT-RTX builder
        made four kernels more for each transformer block (at 197 tokens 22 for 18, at 256 and a dynamic batch 18 for
        14).
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, DYNAMIC_QUANTIZE):
            x = node.args[0]
            assert isinstance(x, Node)
            if get_format(str(node.kwargs["format"])).scale is None or len(shape(x)) == 2:
                continue
            chain, linears = _readers(node)
            if linears is not None:
                self._rewrite(node, x, chain, linears)
                self.fire()
            elif len(shape(x)) != 3:
                self.decline(f"a tensor of {len(shape(x))} axes is read by something else than linear layers", node)

    def _rewrite(self, node: Node, x: Node, chain: list[Node], linears: list[Node]) -> None:
        emit = Emitter(node)
        lead = emit.sizes(x)[:-1]
        node.update_arg(0, emit(aten.reshape.default, x, [-1, shape(x)[-1]]))
        for part in (node, *chain):
            assert callable(part.target)
            part.meta["val"] = fake_call(fake_mode(node.graph), part.target, part.args, part.kwargs)
        for linear in linears:
            after = Emitter(linear)
            product = after(aten.linear.default, *linear.args)
            linear.replace_all_uses_with(after(aten.reshape.default, product, [*lead, shape(linear)[-1]]))


def _readers(node: Node) -> tuple[list[Node], list[Node] | None]:
    """What lies between `node` and its linear layers, in the order of the graph, and those; None if others read it."""
    chain: list[Node] = []
    linears: list[Node] = []
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if is_call(user, aten.linear.default):
            linears.append(user)
        elif is_call(user, DEQUANTIZE, operator.getitem):
            if user not in chain:
                chain.append(user)
                pending += user.users
        else:
            return [], None
    return sorted(chain), linears
