"""What stands in graphs that no pass works on is named."""

from __future__ import annotations

from torch.fx import GraphModule

from passes.base import Pass
from passes.graph import aten, calls
from passes.ir import BATCHED_LINEAR
from passes.sdpa import SDPA
from passes.subgraphs import inner, is_worked_on, operator_name, subgraph_calls

__all__ = ["LeaveSubgraphs"]

_LAYERS = (aten.linear.default, BATCHED_LINEAR, SDPA)


class LeaveSubgraphs(Pass):
    """Leave the graphs in operators other than `torch.cond`, `while_loop` and `scan` as they are.

    Before and after:
        y = map((x, w) -> linear(x, w), [x], [w])

    Requires: nothing.
    Ensures: nothing is changed.
    Declines when: a graph holds a linear layer or an attention.
    Why: what could be quantized and is not is to be listed.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for call in subgraph_calls(gm.graph):
            parts = [] if is_worked_on(call) else inner(gm, call)
            found = sum(1 for part in parts for _ in calls(part.graph, *_LAYERS))
            if found:
                self.decline(
                    f"torch.{operator_name(call)} holds graphs of its own, with {found} linear layers and attentions in"
                    " them that are not quantized",
                    call,
                )
