"""What holds of a call whatever stage looks at it: the name of its operator, complex numbers, the same elements."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from passes.graph import TRANSPARENT, aten

__all__ = ["SAME_ELEMENTS", "is_complex", "operator_name"]

# Every element of the operand and no other, in another order or as often as another.
SAME_ELEMENTS = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints),
    *(aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.expand.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, *TRANSPARENT),
)


def operator_name(node: Node) -> str:
    """`linalg_inv` of a call of `aten.linalg_inv.default`; empty for what is no operator of ATen."""
    target: Any = node.target
    name = str(target._schema.name) if isinstance(target, torch._ops.OpOverload) else ""
    return name.removeprefix("aten::") if name.startswith("aten::") else ""


def is_complex(node: Node) -> bool:
    """Whether `node` makes, or is, a complex tensor, or several tensors of which one is complex."""
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(value, torch.Tensor) and value.dtype.is_complex for value in leaves)
