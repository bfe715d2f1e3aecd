"""What stands in graphs that a call holds is named: no pass changes it."""

from __future__ import annotations

from torch.fx import GraphModule

from passes.base import Pass
from passes.graph import aten
from passes.ir import BATCHED_LINEAR
from passes.sdpa import SDPA
from passes.subgraphs import bodies, operator_name, subgraph_calls

__all__ = ["LeaveSubgraphs"]

_LAYERS = (aten.linear.default, BATCHED_LINEAR, SDPA)


class LeaveSubgraphs(Pass):
    """Leave the graphs in `torch.cond`, `while_loop`, `scan` and their like as they are.

    Before and after:
        y = cond(p, (x) -> linear(x, w), (x) -> x, [x, w])

    Requires: nothing.
    Ensures: nothing is changed.
    Declines when: a graph holds a linear layer or an attention.
    Why: what could be quantized and is not is to be listed.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for call in subgraph_calls(gm.graph):
            inner = [body for body in bodies(gm) if body.call is call]
            found = sum(n.op == "call_function" and n.target in _LAYERS for body in inner for n in body.gm.graph.nodes)
            if found:
                self.decline(
                    f"torch.{operator_name(call)} holds graphs of its own, with {found} linear layers and attentions in"
                    " them that are not quantized",
                    call,
                )
