"""Complex numbers become pairs of real ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant, constant
from passes.graph import Emitter, argument, aten, dtype, following, is_call, shape, val
from passes.traits import is_complex, operator_name

__all__ = ["ComplexToReal"]

Parts = tuple[Node, Node]

# What does to a complex tensor what it does to its real and its imaginary part, each on its own.
_VIEWS = """
    slice select index index_select gather take_along_dim embedding reshape view _unsafe_view view_as reshape_as flatten
    unflatten transpose permute movedim moveaxis swapaxes t unsqueeze squeeze expand expand_as broadcast_to repeat tile
    repeat_interleave narrow split split_with_sizes tensor_split chunk unbind unfold flip roll triu tril getitem
    clone alias detach contiguous lift_fresh_copy _to_copy resolve_neg resolve_conj
"""
_EACH = frozenset((*_VIEWS.split(), "neg", "_neg_view", "negative", "positive", "sum", "mean", "cumsum", "diff"))
# The same, with real operands and numbers beside complex ones, which have an imaginary part of 0.
_ADDING = """
    cat concat concatenate stack hstack vstack add sub subtract rsub where masked_fill pad constant_pad_nd
    full full_like new_full zeros zeros_like new_zeros
"""
_SUMS = frozenset(_ADDING.split())
_SUMMANDS = ("self", "other", "tensors", "value", "fill_value")  # what their operands are called
_ONES = frozenset(("ones", "ones_like", "new_ones"))
_PRODUCTS = frozenset(("mul", "multiply", "matmul", "mm", "bmm", "einsum", "outer", "kron"))
_POWERS = frozenset(("square", "pow"))
_QUOTIENTS = frozenset(("div", "divide", "true_divide", "reciprocal"))
_CONJUGATES = frozenset(("_conj", "conj", "conj_physical", "_conj_physical"))
_SOURCES = frozenset(("view_as_complex", "view.dtype", "complex", "polar"))
_KNOWN = frozenset(("exp", *_EACH, *_SUMS, *_ONES, *_PRODUCTS, *_POWERS, *_QUOTIENTS, *_CONJUGATES, *_SOURCES))
_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


class ComplexToReal(Pass):
    """Compute on real and imaginary parts what the model computes on complex numbers.

    Before, as rotary embeddings are written (table complex):
        z = mul(view_as_complex(reshape(x, [..., 16, 2])), table)
        y = flatten(view_as_real(z), -2)
    After:
        a, b = select(reshape(x, [..., 16, 2]), -1, 0), select(reshape(x, [..., 16, 2]), -1, 1)
        y = flatten(stack([a * table_real - b * table_imag, a * table_imag + b * table_real], -1), -2)

    Requires: a functional graph.
    Ensures: the values of the real numbers that the model makes of complex ones, but for the order of their sums. What
        is left of complex numbers stands around operators that have no other form (a Fourier transform, a magnitude):
        `view_as_real(f(view_as_complex(x)))`.
    Declines when: never; complex outputs of the program and operators that are not known stay as they are.
    Why: ONNX and TensorRT have no complex numbers and the exporter of torch writes few operators on them; in half
        precision torch itself has hardly any.
    """

    def rewrite(self, gm: GraphModule) -> None:
        self.gm = gm
        self.made: dict[Node, Parts | None] = {}
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or not any(map(is_complex, node.all_input_nodes)):
                continue
            real = None if is_complex(node) else self._real(node)
            if real is not None:
                node.replace_all_uses_with(real)
                self.fire()
            elif _name(node) not in _KNOWN:
                for operand in filter(is_complex, node.all_input_nodes):
                    self._rebuild(operand, node)

    def _real(self, node: Node) -> Node | None:
        """The real tensor that `node` makes, made of the parts of a complex one; None if there is no better form."""
        name, source = _name(node), node.args[0]
        if name not in ("view_as_real", "view.dtype", "real", "imag", "angle", "_to_copy"):
            return None
        assert isinstance(source, Node)
        if dtype(node) not in (torch.float16, torch.float32, torch.float64):  # integers as bits, truth values
            return None
        if name == "view.dtype" and dtype(node) is not _REAL[dtype(source)]:
            return None
        if name == "view_as_real" and is_call(source, aten.view_as_complex.default):
            return source.all_input_nodes[0]
        parts = self._parts(source)
        if parts is None and name == "view_as_real":
            return None
        re, im = parts or self._split(source)
        emit = Emitter(node)
        if name in ("view_as_real", "view.dtype"):
            pairs = emit(aten.stack.default, [re, im], -1)
            return pairs if name == "view_as_real" else emit(aten.flatten.using_ints, pairs, -2)
        if name == "angle":
            return emit(aten.atan2.default, im, re)
        if name == "_to_copy":
            return emit(aten._to_copy.default, re, **node.kwargs)
        return re if name == "real" else im

    def _rebuild(self, operand: Node, user: Node) -> None:
        """Let `user`, which is not known, read a complex tensor that is made of the parts of `operand`."""
        if operand.op != "call_function" or _name(operand) not in _KNOWN or not isinstance(val(operand), torch.Tensor):
            return
        parts = None if is_call(operand, aten.view_as_complex.default) else self._parts(operand)
        if parts is not None:
            emit = Emitter(user)
            whole = emit(aten.view_as_complex.default, emit(aten.stack.default, list(parts), -1))
            user.replace_input_with(operand, whole)
            self.fire()

    def _parts(self, node: Node) -> Parts | None:
        """Real and imaginary part of `node`, or lists of them; None if it is made by something that is not known."""
        if node not in self.made:
            self.made[node] = self._stored(node) if node.op == "get_attr" else self._computed(node)
        return self.made[node]

    def _stored(self, node: Node) -> Parts | None:
        tensor = constant(self.gm, node)
        if tensor is None:
            return None
        whole = tensor.detach().resolve_conj()
        parts = {"real": whole.real.contiguous(), "imag": whole.imag.contiguous()}
        re, im = (add_constant(self.gm, f"{node.target}_{name}", part, node) for name, part in parts.items())
        return re, im

    def _computed(self, node: Node) -> Parts | None:
        name, emit = _name(node), Emitter(node)
        if name in _SOURCES:
            return _source(emit, node, name)
        operands = {operand: self._operand(operand) for operand in node.all_input_nodes if is_complex(operand)}
        if name not in _KNOWN or not all(operands.values()):
            return None
        parts: dict[Node, Parts] = {operand: pair for operand, pair in operands.items() if pair is not None}
        if name in _CONJUGATES:
            ((re, im),) = parts.values()
            return re, emit(aten.neg.default, im)
        if name == "exp":
            ((re, im),) = parts.values()
            size = emit(aten.exp.default, re)
            return _polar(emit, size, im)
        if name in _PRODUCTS:
            return _product(emit, node, parts)
        if name in _POWERS:
            return _power(emit, node, parts)
        if name in _QUOTIENTS:
            return _quotient(emit, node, parts)
        if isinstance(argument(node, "alpha") if name in _SUMS else None, complex):
            return None
        return _each(emit, node, parts)

    def _operand(self, operand: Node) -> Parts | None:
        parts = self._parts(operand)
        if parts is None and isinstance(val(operand), torch.Tensor):
            parts = self.made[operand] = self._split(operand)
        return parts

    def _split(self, node: Node) -> Parts:
        """The parts of what is made by something that is not known."""
        emit = Emitter(following(node), like=node)
        pair = emit(aten.view_as_real.default, node)
        return emit(aten.select.int, pair, -1, 0), emit(aten.select.int, pair, -1, 1)


def _name(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    return "view.dtype" if is_call(node, aten.view.dtype) else operator_name(node)


def _source(emit: Emitter, node: Node, name: str) -> Parts | None:
    """The parts of what is made of real tensors."""
    re, im = (*node.args, None)[:2]
    assert isinstance(re, Node)
    if name == "view.dtype":
        if dtype(re) is not _REAL[dtype(node)]:
            return None
        re, name = emit(aten.unflatten.int, re, -1, [-1, 2]), "view_as_complex"
    if name == "view_as_complex":
        return emit(aten.select.int, re, -1, 0), emit(aten.select.int, re, -1, 1)
    assert isinstance(im, Node)
    if name == "polar":
        return _polar(emit, re, im)
    return (re, im) if shape(re) == shape(im) else None


def _polar(emit: Emitter, size: Node, angle: Node) -> Parts:
    cos, sin = emit(aten.cos.default, angle), emit(aten.sin.default, angle)
    return emit(aten.mul.Tensor, size, cos), emit(aten.mul.Tensor, size, sin)


def _of(value: Any, parts: Mapping[Node, Parts]) -> tuple[Any, Any]:
    """Real and imaginary part of an operand or a number; None for an imaginary part that is 0."""
    if isinstance(value, complex):
        return value.real, value.imag
    return parts.get(value, (value, None)) if isinstance(value, Node) else (value, None)


def _product(emit: Emitter, node: Node, parts: Mapping[Node, Parts]) -> Parts | None:
    """The parts of the result of an operator that is linear in both of its operands."""
    is_einsum = _name(node) == "einsum"
    operands: Any = node.args[1] if is_einsum else node.args
    if len(operands) != 2:
        return None
    assert callable(node.target)
    call = partial(emit, node.target)
    if is_einsum:
        return _times(emit, lambda x, y: call(node.args[0], [x, y]), *(_of(value, parts) for value in operands))
    return _times(emit, call, *(_of(value, parts) for value in operands))


def _times(emit: Emitter, call: Callable[[Any, Any], Node], left: tuple[Any, Any], right: tuple[Any, Any]) -> Parts:
    """(a + bi)(c + di), where an imaginary part that is None is 0."""
    (a, b), (c, d) = left, right
    if d is None:
        return call(a, c), call(b, c)
    if b is None:
        return call(a, c), call(a, d)
    re = emit(aten.sub.Tensor, call(a, c), call(b, d))
    return re, emit(aten.add.Tensor, call(a, d), call(b, c))


def _power(emit: Emitter, node: Node, parts: Mapping[Node, Parts]) -> Parts | None:
    """(a + bi) to a small number, as products."""
    exponent = argument(node, "exponent", 2)
    if exponent not in (2, 3, 4) or node.args[0] not in parts:
        return None
    base = power = parts[node.args[0]]  # type: ignore[index]
    for _ in range(int(exponent) - 1):
        power = _times(emit, partial(emit, aten.mul.Tensor), power, base)
    return power


def _quotient(emit: Emitter, node: Node, parts: Mapping[Node, Parts]) -> Parts | None:
    """(a + bi) / (c + di), or 1 / (c + di)."""
    if node.kwargs:  # rounded
        return None
    operands: list[Any] = [1.0, *node.args] if _name(node) == "reciprocal" else list(node.args)
    dividend, (c, d) = (_of(value, parts) for value in operands)
    inverse: tuple[Any, Any]
    if d is None and not isinstance(dividend[0], Node):  # exporters take no number for the first operand
        inverse = emit(aten.reciprocal.default, c), None
    elif d is None:
        return emit(aten.div.Tensor, dividend[0], c), emit(aten.div.Tensor, dividend[1], c)
    elif isinstance(c, Node):
        square = emit(aten.add.Tensor, emit(aten.mul.Tensor, c, c), emit(aten.mul.Tensor, d, d))
        inverse = emit(aten.div.Tensor, c, square), emit(aten.neg.default, emit(aten.div.Tensor, d, square))
    else:
        inverse, dividend = dividend, ((1 / complex(c, d)).real, (1 / complex(c, d)).imag)
    return _times(emit, partial(emit, aten.mul.Tensor), inverse, dividend)


def _each(emit: Emitter, node: Node, parts: Mapping[Node, Parts]) -> Parts:
    """`node` on the real parts of its operands, and on the imaginary ones, which are 0 for what is real."""
    target: Any = node.target
    adds = _name(node) in _SUMS

    def part(index: int, value: Any, argument: str) -> Any:
        if isinstance(value, (list, tuple)):
            return [part(index, item, argument) for item in value]
        if isinstance(value, torch.dtype):
            return _REAL.get(value, value)
        if isinstance(value, Node) and value in parts:
            return parts[value][index]
        if not adds or argument not in _SUMMANDS or value is None:
            return value
        if isinstance(value, Node):
            return value if not index else emit(aten.zeros_like.default, value)
        return (value.real, value.imag)[index] if isinstance(value, complex) else value * (1 - index)

    made = []
    names = [argument.name for argument in target._schema.arguments] if adds else []
    for index in (0, 1):
        args = [part(index, value, names[at] if adds else "") for at, value in enumerate(node.args)]
        kwargs = {name: part(index, value, name) for name, value in node.kwargs.items()}
        made.append(emit(target, *args, **kwargs))
    if _name(node) in _ONES or (not parts and not adds):  # or a cast of a real tensor
        made[1] = emit(aten.zeros_like.default, made[0])
    return made[0], made[1]
