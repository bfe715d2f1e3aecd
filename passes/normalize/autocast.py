"""What autocast did to a graph, written out."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.errors import PassError
from passes.graph import Emitter, aten, fake_call, fake_mode, following, place_of, val


class MaterializeAutocast(Pass):
    """Add the casts that autocast made below the operators of a graph that was traced above them.

    Before, traced under `torch.autocast("cpu", torch.bfloat16)` (x, w float32; y bfloat16):
        y = linear(x, w)
        z = softmax(y)                      # float32 on CUDA
    After:
        y = linear(_to_copy(x, bfloat16), _to_copy(w, bfloat16))
        z = softmax(_to_copy(y, float32))

    Requires: each node's fake value as it was made, under autocast; autocast off while the pass runs.
    Ensures: every operator gives its recorded dtype without autocast. A tensor is cast once for all of its readers.
    Declines when: never; raises `PassError` for an operator whose dtype no cast of its operands explains.
    Why: a graph traced before dispatch records the operators that the model calls, and autocast works below them.
    """

    def rewrite(self, gm: GraphModule) -> None:
        casts: dict[tuple[Node, torch.dtype], Node] = {}
        for node in list(gm.graph.nodes):
            recorded = node.meta.get("val")
            if node.op != "call_function" or not isinstance(recorded, torch.Tensor) or _gives(node, recorded.dtype):
                continue
            for operand in node.all_input_nodes:
                if _is_float(operand) and val(operand).dtype != recorded.dtype:
                    node.replace_input_with(operand, _cast(operand, recorded.dtype, casts))
            if not _gives(node, recorded.dtype):
                raise PassError(
                    f"{place_of(node)}: autocast made {recorded.dtype} of {node.target}, which no cast of its operands"
                    " gives; leave this part out of autocast"
                )
            self.fire()


def _gives(node: Node, dtype: torch.dtype) -> bool:
    """Whether `node` makes `dtype` of its operands as they are, without autocast."""
    if not dtype.is_floating_point or not any(map(_is_float, node.all_input_nodes)):
        return True
    assert callable(node.target)
    try:
        result = fake_call(fake_mode(node.graph), node.target, node.args, node.kwargs)
    except RuntimeError:  # operands of different dtypes, where the operator takes one
        return False
    return not isinstance(result, torch.Tensor) or result.dtype == dtype


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16, torch.float32)


def _cast(operand: Node, dtype: torch.dtype, casts: dict[tuple[Node, torch.dtype], Node]) -> Node:
    if (operand, dtype) not in casts:
        casts[operand, dtype] = Emitter(following(operand), like=operand)(aten._to_copy.default, operand, dtype=dtype)
    return casts[operand, dtype]
