"""Sums by index are computed in float32."""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, dtype, is_call

__all__ = ["WideIndexedSums"]

_SUMS = (aten.index_add.default, aten.index_put.default, aten.scatter_add.default, aten.scatter_reduce.two)
_HALF = (torch.float16, torch.bfloat16)


class WideIndexedSums(Pass):
    """Add rows at indices in float32.

    Before (float16):
        y = index_add(x, 0, tokens, rows)
    After:
        y = to(index_add(to(x, fp32), 0, tokens, to(rows, fp32)), fp16)

    Requires: nothing.
    Ensures: the same sums, rounded once.
    Declines when: never.
    Why: ONNX Runtime 1.31 has no ScatterND and ScatterElements that add in half precision.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, *_SUMS):
            if dtype(node) not in _HALF or (is_call(node, aten.index_put.default) and not argument(node, "accumulate")):
                continue
            emit = Emitter(node)
            half = dtype(node)
            wide: dict[Node, Node] = {}
            for operand in node.all_input_nodes:
                if dtype(operand) is half:
                    wide[operand] = emit(aten._to_copy.default, operand, dtype=torch.float32)
            args, kwargs = map_arg((node.args, dict(node.kwargs)), partial(_one_of, wide))
            assert callable(node.target)
            result = emit(node.target, *args, **kwargs)
            node.replace_all_uses_with(emit(aten._to_copy.default, result, dtype=half))
            gm.graph.erase_node(node)
            self.fire()


def _one_of(replaced: dict[Node, Node], node: Node) -> Node:
    return replaced.get(node, node)
