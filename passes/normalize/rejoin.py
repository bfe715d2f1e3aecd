"""Linear layers of a quantized program that torch has decomposed are linear layers again."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.base import Pass
from passes.constants import is_constant_expression
from passes.graph import Emitter, aten, calls, is_call, shape
from passes.ir import DEQUANTIZE
from passes.normalize.linear import transposed
from passes.reading import Operand
from passes.subgraphs import all_calls

_VIEWS = (aten.view.default, aten._unsafe_view.default)
_RESHAPES = (*_VIEWS, aten.reshape.default)


class RejoinLinears(Pass):
    """Rewrite what `run_decompositions()` makes of the linear layers of a quantized program to `aten.linear`.

    Before:
        x = dequantize(..); w = dequantize(codes, scale)        # or a weight in floating point
        y = view(addmm(bias, view(x, [b * s, k]), permute(w, [1, 0])), [b, s, n])      # mm without a bias
    After:
        y = linear(x, w, bias)                                  # and other views are reshapes

    Requires: graph of `unlift`.
    Ensures: the same product; x stands at the linear layer itself, as other passes and reports look for it. A graph
        without operators of the IR stays as it is.
    Declines when: the product is scaled (`alpha`, `beta`), or what is added is no bias.
    Why: the program of `quantize` is an ExportedProgram like others, and a user may decompose it. In this form back
        ends multiply in floating point, as there is a transpose between codes and product, and reports count nothing.
    """

    def rewrite(self, gm: GraphModule) -> None:
        if not any(all_calls(gm, DEQUANTIZE)):
            return
        fired = self.log.fired[self.name]
        for node in calls(gm.graph, aten.addmm.default, aten.mm.default):
            *bias, rows, columns = node.args
            weight = transposed(columns)
            if weight is None or not isinstance(rows, Node):
                continue
            if Operand.read(weight) is None and not is_constant_expression(weight):
                continue
            if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
                self.decline("the product or the bias is multiplied by a number", node)
            elif bias and shape(bias[0]) != shape(weight)[:1]:  # type: ignore[arg-type]  # addmm adds a tensor
                self.decline("what is added to the product is no bias", node)
            else:
                self._rejoin(node, rows, weight, bias)
                self.fire()
        if self.log.fired[self.name] > fired:  # so it came from there, and its reshapes have become views
            for node in calls(gm.graph, *_VIEWS):
                node.target = aten.reshape.default

    def _rejoin(self, node: Node, rows: Node, weight: Node, bias: Sequence[object]) -> None:
        x = rows.args[0] if is_call(rows, *_RESHAPES) else rows
        x = x if isinstance(x, Node) and len(shape(x)) > 1 and shape(x)[-1] == shape(weight)[1] else rows
        emit = Emitter(node)
        joined = emit(aten.linear.default, x, weight, *bias)
        for user in list(node.users):
            if is_call(user, *_RESHAPES) and _same(shape(user), shape(joined)):
                user.replace_all_uses_with(joined)
                node.graph.erase_node(user)
        if node.users:
            same = len(shape(joined)) == 2
            sizes = [emit.sizes(rows)[0], shape(weight)[0]]  # not of `node`, all readers of which are given the result
            node.replace_all_uses_with(joined if same else emit(aten.reshape.default, joined, sizes))


def _same(sizes: Sequence[object], others: Sequence[object]) -> bool:
    return len(sizes) == len(others) and all(statically_known_true(a == b) for a, b in zip(sizes, others, strict=True))
