"""What can be quantized: operator -> its kind, operands and axis of channels; and what has a weight and cannot be.

Sites, reports and checks read this table. An operator more is a row more: `find_sites` has its operands then, recipes
name them, `InsertQdq` quantizes them, and reports count its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from passes.graph import aten, is_call, shape
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, QUANTIZE
from passes.sdpa import SDPA
from passes.state import UPDATES, cache_kind

__all__ = [
    "NORMS",
    "OPERATORS",
    "SUFFIXES",
    "TRANSPOSED",
    "Operator",
    "added_convolution",
    "counted_kinds",
    "of_kind",
    "operator_of",
    "quantizable",
    "refusals",
]

SUFFIXES = {
    "input": "input_quantizer",
    "weight": "weight_quantizer",
    "output": "output_quantizer",
    "residual": "residual_quantizer",
    "q": "q_bmm_quantizer",
    "k": "k_bmm_quantizer",
    "v": "v_bmm_quantizer",
    "softmax": "softmax_bmm_quantizer",
    "k_cache": "k_cache_quantizer",
    "v_cache": "v_cache_quantizer",
}
"""Operand -> the last part of its quantizer's name."""


@dataclass(frozen=True)
class Operator:
    """What of an operator can be quantized.

    Attributes:
        kind: what reports call its layers.
        operands: those with a quantizer -> which argument each is; None for a result, or something inside of it.
        counted: `coverage` counts its layers: each is quantized or listed as not quantized.
        channel_axis: of the weight, along which a scale for each channel runs; asked of the call where that decides.
        groups: how many axes of the weight before those of a channel number independent weights: 1 for experts.
        gemm: products are summed over the last axis of input and weight: scales can be those of tokens and blocks,
            layers can be merged, and products over few elements gain nothing.
        refusal: why its weight is quantized by nothing; empty for what can be.
        instead: another row for some calls of the operator; None for the others.
    """

    kind: str
    operands: Mapping[str, int | None] = field(default_factory=dict)
    counted: bool = False
    channel_axis: int | Callable[[Node], int] = -2
    groups: int = 0
    gemm: bool = True
    refusal: str = ""
    instead: Callable[[Node], Operator | None] | None = None

    def weight(self, call: Node) -> Node | None:
        """The weight of a `call` of the operator, which `operands` has a place for; None for one without."""
        index = self.operands.get("weight")
        found = None if index is None else call.args[index]
        return found if isinstance(found, Node) else None

    def reduction(self, call: Node) -> int | None:
        """How many products are added for an element of the result of `call`; None if it has no weight of known size.

        A scale of the weight for each channel is one number for so many elements.
        """
        weight = self.weight(call)
        if weight is None:
            return None
        count = 1
        for axis in self.reduced_axes(call):
            size = shape(weight)[axis]
            if not isinstance(size, int):
                return None
            count *= size
        return count

    def reduced_axes(self, call: Node) -> tuple[int, ...]:
        """The axes of the weight of `call` along which a scale for each channel is one number."""
        weight = self.weight(call)
        assert weight is not None, f"{call} has no weight"
        rank = len(shape(weight))
        axis = self.channel_axis if isinstance(self.channel_axis, int) else self.channel_axis(call)
        return tuple(index for index in range(self.groups, rank) if index != axis % rank)


_LAYER: Mapping[str, int | None] = {"input": 0, "weight": 1, "output": None}
_NORM = Operator("norm", {"output": None})
NORMS = (aten.layer_norm.default, aten.rms_norm.default)

_STATES = "the products of one step wait for those of the step before, in half precision"
_TABLE = "rows are looked up and not multiplied"
_SPELLED = "it is multiplied in a form that has no quantizers"
_SPREADS = "no target has a kernel for transposed convolutions on codes: TensorRT runs them in half precision"


def _overloads(*packets: OpOverloadPacket) -> list[OpOverload]:
    return [getattr(packet, name) for packet in packets for name in packet.overloads()]  # type: ignore[no-untyped-call]


_RECURRENT = (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
_CELLS = (aten.lstm_cell, aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell)
_PRODUCTS = (aten.bmm, aten.baddbmm, aten.matmul, aten.mm, aten.addmm, aten.einsum)
_EMBEDDINGS = (aten.embedding, aten.embedding_bag, aten._embedding_bag, aten._embedding_bag_forward_only)

TRANSPOSED = Operator("transposed_convolution", refusal=_SPREADS)
CONVOLUTION = Operator(
    "convolution",
    _LAYER,
    counted=True,
    channel_axis=0,
    gemm=False,
    instead=lambda call: TRANSPOSED if call.args[6] else None,
)
PLAIN_ADD = Operator("add")


def _residual(call: Node) -> Operator | None:
    """The row of an add, by which operand is the skip branch: the one that is no result of a convolution."""
    left, right = call.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node) or left is right or call.kwargs.get("alpha", 1) != 1:
        return PLAIN_ADD
    if not all(isinstance(operand.meta.get("val"), torch.Tensor) for operand in (left, right)):
        return PLAIN_ADD
    if shape(left) != shape(right) or "get_attr" in (left.op, right.op):
        return PLAIN_ADD
    if added_convolution(left) is not None:
        return None
    return RESIDUAL_FIRST if added_convolution(right) is not None else PLAIN_ADD


def added_convolution(operand: object) -> Node | None:
    """The convolution that nothing but this operand of an add reads, perhaps through Q/DQ; None for anything else."""
    node = operand
    while isinstance(node, Node) and len(node.users) == 1 and is_call(node, QUANTIZE, DEQUANTIZE):
        node = node.args[0]
    is_convolution = is_call(node, aten.convolution.default)
    return node if isinstance(node, Node) and is_convolution and len(node.users) == 1 and not node.args[6] else None


RESIDUAL_FIRST = Operator("residual", {"residual": 0}, gemm=False)
RESIDUAL = Operator("residual", {"residual": 1}, gemm=False, instead=_residual)

CACHES = {kind: Operator("cache", {f"{kind}_cache": None}, gemm=False) for kind in ("k", "v")}
NO_CACHE = Operator("write")


def _cache(call: Node) -> Operator:
    """The row of a concatenation or a write: a cache of keys or of values where it appends to one."""
    kind = cache_kind(call)
    return NO_CACHE if kind is None else CACHES[kind]


OPERATORS: dict[Any, Operator] = {
    aten.linear.default: Operator("linear", _LAYER, counted=True),
    BATCHED_LINEAR: Operator("experts", _LAYER, counted=True, groups=1),
    aten.convolution.default: CONVOLUTION,
    SDPA: Operator("attention", {"q": 0, "k": 1, "v": 2, "softmax": None}, counted=True),
    aten.add.Tensor: RESIDUAL,
    **dict.fromkeys(UPDATES, replace(CACHES["k"], instead=_cache)),
    **dict.fromkeys(NORMS, _NORM),
    **dict.fromkeys(_overloads(*_RECURRENT, *_CELLS), Operator("recurrent", refusal=_STATES)),
    **dict.fromkeys(_overloads(*_PRODUCTS), Operator("product", refusal=_SPELLED)),
    **dict.fromkeys(_overloads(aten.bilinear), Operator("bilinear", refusal=_SPELLED)),
    **dict.fromkeys(_overloads(*_EMBEDDINGS), Operator("embedding", refusal=_TABLE)),
}
"""Overload -> what of it can be quantized; of what is in a normalized graph, those of which a weight can be."""


def operator_of(node: Node) -> Operator | None:
    """The row of what `node` calls, if there is one: of a transposed convolution another than of a convolution."""
    row = OPERATORS.get(node.target) if node.op == "call_function" else None
    return row if row is None or row.instead is None else row.instead(node) or row


def quantizable() -> list[Callable[..., Any]]:
    """The overloads of which something can be quantized."""
    return [target for target, row in OPERATORS.items() if not row.refusal]


def of_kind(*kinds: str) -> list[Callable[..., Any]]:
    """The overloads of these kinds."""
    return [target for target, row in OPERATORS.items() if row.kind in kinds]


def counted_kinds() -> tuple[str, ...]:
    """The kinds that `coverage` counts, in the order of the table."""
    return tuple(dict.fromkeys(row.kind for row in OPERATORS.values() if row.counted))


def refusals() -> dict[str, str]:
    """Kind -> why its weights are quantized by nothing."""
    rows = (row for found in OPERATORS.values() for row in (found, TRANSPOSED))
    return {row.kind: row.refusal for row in rows if row.refusal}
