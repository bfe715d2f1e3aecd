"""Operands of several dtypes get the one that torch computes in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.base import Pass
from passes.graph import Emitter, aten, fake_call, fake_mode, following, is_call, is_pointwise, val
from passes.sdpa import SDPA
from passes.traits import operator_name

__all__ = ["WriteOutPromotion"]

# Other spellings of pointwise operators, which torch does not tag so.
_ALIASES = """
    multiply divide true_divide floor_divide subtract greater greater_equal less less_equal not_equal arctan2 where
    masked_fill __and__ __or__ __xor__
"""
_POINTWISE = frozenset(_ALIASES.split())
_CHOOSING = ("condition", "mask")  # operands that choose among others
_NUMBERS = ("self", "other", "exponent", "min", "max")  # arguments that take part as a number, too
# They look at the shape or the dtype of one operand, and at nothing else of it; or make truth values of any dtype.
_SHAPES = ("expand_as", "view_as", "reshape_as", "type_as", "broadcast_tensors")
_TRUTH = ("logical_and", "logical_or", "logical_xor")


class WriteOutPromotion(Pass):
    """Cast the operands of a call to the dtype that torch promotes them to.

    Before (x float16, t float32, i int64, k bool):
        cat([x, t]); maximum(x, t); rsub(i, 1.0); cat([x, k]); layer_norm(x, [64], w_float32); gt(i, 0.5)
    After:
        cat([_to_copy(x, float32), t]); maximum(_to_copy(x, float32), t); rsub(_to_copy(i, float32), 1.0);
        cat([x, _to_copy(k, float16)]); layer_norm(x, [64], _to_copy(w, float16)); gt(_to_copy(i, float32), 0.5)

    Requires: nothing.
    Ensures: every result keeps its dtype: the operands get the dtype that they promote to by torch's rules (a tensor
        without axes counts less than one with, a number least), or else that of the first, where the result has that.
        Of a norm in half precision with weights in float32 the weights are rounded. A float mask of an attention does
        not become infinite.
    Declines when: never. Complex numbers, FP8 and operators that take tensors of one dtype only stay as they are.
    Why: ONNX operators take operands of one type. The exporter of torch writes casts for some pointwise operators, and
        a file that no one loads, or that compares 1 with int(0.5), for others.
    """

    def rewrite(self, gm: GraphModule) -> None:
        casts: dict[tuple[Node, torch.dtype, bool], Node] = {}
        for node in list(gm.graph.nodes):
            operands = list(_operands(node))
            for common in _candidates(node, operands):
                changed = {o for o in operands if val(o).dtype is not common}
                if changed and self._cast_all(node, changed, common, casts):
                    break

    def _cast_all(
        self, node: Node, changed: set[Node], common: torch.dtype, casts: dict[tuple[Node, torch.dtype, bool], Node]
    ) -> bool:
        """Cast `changed` for `node` if that makes results of the dtypes that it has."""
        mode = fake_mode(node.graph)
        cast = {operand: fake_call(mode, aten._to_copy.default, (operand,), {"dtype": common}) for operand in changed}
        args, kwargs = pytree.tree_map_only(Node, lambda n: cast.get(n, val(n)), (node.args, node.kwargs))
        assert callable(node.target)
        try:
            made = fake_call(mode, node.target, args, kwargs)
        except (RuntimeError, TypeError, NotImplementedError):  # no dtype for this operator
            return False
        if _dtypes(made) != _dtypes(val(node)):
            return False
        for operand in changed:
            node.replace_input_with(operand, self._cast(node, operand, common, casts))
        self.fire()
        return True

    def _cast(
        self, node: Node, operand: Node, common: torch.dtype, casts: dict[tuple[Node, torch.dtype, bool], Node]
    ) -> Node:
        masks = is_call(node, SDPA) and torch.finfo(common).max < torch.finfo(val(operand).dtype).max
        if (operand, common, masks) not in casts:
            emit = Emitter(following(operand), like=operand if operand.op == "call_function" else node)
            value = operand
            if masks:  # half of the lowest number is still finite with a score added to it
                value = emit(aten.clamp.default, operand, torch.finfo(common).min / 2)
            casts[operand, common, masks] = emit(aten._to_copy.default, value, dtype=common)
        return casts[operand, common, masks]


def _operands(node: Node) -> Iterator[Node]:
    """The tensors whose values go into the result of `node`: of a pointwise operator and of a list all, of others the
    floating-point ones, as integers are indices there."""
    name = operator_name(node)
    if not name or name in (*_SHAPES, *_TRUTH):
        return
    everything = is_pointwise(node) or name in _POINTWISE
    for argument, value in _arguments(node):
        kind = str(argument.type)
        if argument.name in _CHOOSING or kind not in ("Tensor", "Optional[Tensor]", "List[Tensor]"):
            continue
        for operand in value if isinstance(value, (list, tuple)) else (value,):
            tensor = operand.meta.get("val") if isinstance(operand, Node) else None
            if isinstance(tensor, torch.Tensor) and _takes_part(tensor.dtype, everything or kind == "List[Tensor]"):
                yield operand


def _takes_part(dtype: torch.dtype, everything: bool) -> bool:
    if dtype.is_floating_point:
        return dtype.itemsize > 1  # FP8 holds codes
    return everything and not dtype.is_complex


def _arguments(node: Node) -> Iterator[tuple[Any, Any]]:
    """The arguments of a call that are given, with their declarations."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args) and not argument.kwarg_only:
            yield argument, node.args[index]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _candidates(node: Node, operands: Sequence[Node]) -> list[torch.dtype]:
    """The dtypes that `node` may compute in, the likeliest first."""
    if not operands:
        return []
    tensors = [val(operand) for operand in operands]
    numbers = [0.5 if isinstance(v, float | torch.SymFloat) else 1 for v in _numbers(node)]
    if len({tensor.dtype for tensor in tensors}) == 1 and (tensors[0].dtype.is_floating_point or 0.5 not in numbers):
        return []
    ranked = [[t.dtype for t in tensors if t.ndim], [t.dtype for t in tensors if not t.ndim]]
    examples: list[Any] = [
        torch.empty((1,) * (1 - rank), dtype=reduce(torch.promote_types, dtypes), device="meta")
        for rank, dtypes in enumerate(ranked)
        if dtypes
    ]
    common = examples[0].dtype
    for other in (*examples[1:], *numbers):
        common = torch.result_type(torch.empty(examples[0].shape, dtype=common, device="meta"), other)
    return list(dict.fromkeys((common, tensors[0].dtype)))


def _numbers(node: Node) -> Iterator[Any]:
    """The numbers that `node` computes with as with operands."""
    if not is_pointwise(node) and operator_name(node) not in _POINTWISE:
        return
    for argument, value in _arguments(node):
        value = value.meta.get("val") if isinstance(value, Node) else value
        if argument.name in _NUMBERS and isinstance(value, int | float | torch.SymInt | torch.SymFloat):
            yield value


def _dtypes(value: Any) -> list[torch.dtype | None]:
    return [leaf.dtype if isinstance(leaf, torch.Tensor) else None for leaf in pytree.tree_leaves(value)]
