"""Products in float16 on a CPU that has no arithmetic for it."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.compat import cpu_has_float16
from passes.graph import Emitter, aten, calls, dtype
from passes.ir import BATCHED_LINEAR
from passes.sdpa import SDPA

PRODUCTS = (aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default, BATCHED_LINEAR, SDPA)


def multiplies_float16() -> bool:
    """Whether products in float16 are fast on this CPU: oneDNN has them where the CPU has AVX512-FP16 or AMX-FP16."""
    return cpu_has_float16()


class WidenHalfProducts(Pass):
    """Compute products of float16 in float32.

    Before:
        y = matmul(a, b)
    After:
        y = half(matmul(float(a), float(b)))

    The same for linear layers, experts and attention that is not quantized.

    Requires: quantized attention is spelled out (`DecomposeAttention`), so that what it rounds to float16 still is.
    Ensures: the same products, and sums that are rounded to float16 once.
    Declines when: the CPU multiplies float16; without a note, as nothing is lost.
    Why: torch has no fast kernel for it: the two products of an attention of [12,197,64] take 86 ms on one core of an
        EPYC, in float32 2 ms; a linear layer takes ten times that of float32.
    """

    def rewrite(self, gm: GraphModule) -> None:
        if multiplies_float16():
            return
        for node in calls(gm.graph, *PRODUCTS):
            if dtype(node) == torch.float16:
                _widen(node)
                self.fire()


def _widen(node: Node) -> None:
    emit = Emitter(node)

    def wide(value: object) -> object:
        if not isinstance(value, Node) or dtype(value) != torch.float16:
            return value
        return emit(aten._to_copy.default, value, dtype=torch.float32)

    assert callable(node.target)
    product = emit(node.target, *map(wide, node.args), **{name: wide(value) for name, value in node.kwargs.items()})
    node.replace_all_uses_with(emit(aten._to_copy.default, product, dtype=torch.float16))
    node.graph.erase_node(node)  # attention is taken for random, as it could have dropout, and would never be dead
