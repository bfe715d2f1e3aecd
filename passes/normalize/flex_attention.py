"""`flex_attention`, whose scores a small program changes, becomes attention written out."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from passes.base import Pass
from passes.graph import TRANSPARENT, Emitter, aten, dtype, is_call, is_pointwise, shape, val
from passes.subgraphs import operator_name, subgraph_calls

__all__ = ["SpellOutFlexAttention"]

# Pointwise without a tag that says so, as they are composites.
_POINTWISE = (
    *(aten.where.self, aten.where.Scalar, aten.where.ScalarOther, aten.where.ScalarSelf),
    *(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor),
    *(aten.__and__.Scalar, aten.__or__.Scalar, aten.__xor__.Scalar, aten._to_copy.default),
    *TRANSPARENT,
)
_CREATES = (aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.full.default)


class SpellOutFlexAttention(Pass):
    """Rewrite `flex_attention` as matmul, softmax, matmul with its programs for scores and masks in between.

    Before, with a program for one score that adds a bias where j <= i, and one for the mask of a window:
        y = flex_attention(q, k, v, (s, b, h, i, j) -> where(i >= j, s + bias[h] * (i - j), -inf), ...)
    After, on all scores at once:
        s = mul(to(matmul(q, transpose(k, -1, -2)), fp32), scale)
        s = where(i[S,1] >= j[S], s + index(bias, h[H,1,1]) * (i[S,1] - j[S]), -inf)
        s = where(i[S,1] - j[S] < 8, s, -inf)
        y = matmul(to(_safe_softmax(s, -1), fp16), v)

    Requires: nothing. `NormalizeAttention` makes one node of it where the programs only add and hide.
    Ensures: the same values up to rounding; zeros for queries that see no key.
    Declines when: a program has operators that do not work on single numbers; then no exporter takes the call.
    Why: attention has one neutral form; a graph of its own is none that quantizers and exporters look into.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in subgraph_calls(gm.graph):
            if operator_name(node) != "flex_attention":
                continue
            try:
                programs = _Programs(gm, node)
                programs.check()
            except _Unknown as reason:
                self.decline(f"flex_attention stays as it is: {reason}", node)
                continue
            _replace(node, programs)
            self.fire()


class _Unknown(Exception):
    """A program does what cannot be done for all scores at once; the message says what."""


class _Programs:
    """The programs of one call: for scores, with its buffers, and for the mask, with others."""

    def __init__(self, gm: GraphModule, node: Node) -> None:
        args: tuple[Any, ...] = node.args
        self.q, self.k, self.v, score, block_mask, self.scale, _, *buffers = args
        mask = block_mask[-1]
        self.node = node
        self.score_buffers, self.mask_buffers = (*buffers, (), ())[:2]
        self.score = getattr(gm, str(score.target))
        self.mask = getattr(gm, str(mask.target))

    def check(self) -> None:
        """Raises _Unknown for what `_replace` could not write; nothing has been written then."""
        q, k, v = (shape(n) for n in (self.q, self.k, self.v))
        if not all(statically_known_true(a == b) for a, b in ((q[0], k[0]), (k[0], v[0]))):
            raise _Unknown("query and key have batches that broadcast")
        if not isinstance(q[1], int) or not isinstance(k[1], int):
            raise _Unknown("the number of heads is dynamic")
        for program, count in ((self.score, 5), (self.mask, 4)):
            _check(program, count)


def _check(program: GraphModule, count: int) -> None:
    """`count`: how many inputs are single numbers, the score and its place; buffers follow."""
    inputs = program.graph.find_nodes(op="placeholder")
    varying = set(inputs[:count])
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            raise _Unknown(f"its program reads {node.target}")
        if not varying.intersection(node.all_input_nodes) or is_call(node, *_CREATES):
            continue
        varying.add(node)
        buffers = [n for n in node.all_input_nodes if n not in varying and _has_axes(n)]
        if is_call(node, aten.index.Tensor):
            if None in node.args[1] or buffers[1:]:
                raise _Unknown(f"its program has an index that is no single number ({node.name})")
        elif buffers or not (is_pointwise(node) or is_call(node, *_POINTWISE)):
            raise _Unknown(f"its program has {node.target}, which does not work on single numbers")
        elif _has_axes(node):
            raise _Unknown(f"its program makes a tensor of {len(shape(node))} axes ({node.name})")


def _has_axes(node: Node) -> bool:
    """Whether `node` is more than a number; a dynamic size is one."""
    return isinstance(val(node), torch.Tensor) and len(shape(node)) > 0


def _replace(node: Node, programs: _Programs) -> None:
    emit = Emitter(node)
    q, k, v = programs.q, programs.k, programs.v
    groups = shape(q)[1] // shape(k)[1]
    if groups > 1:
        k, v = (emit(aten.repeat_interleave.self_int, operand, groups, 1) for operand in (k, v))
    scores = emit(aten.matmul.default, q, emit(aten.transpose.int, k, -1, -2))
    wide = dtype(programs.score.graph.find_nodes(op="placeholder")[0])
    if dtype(scores) is not wide:
        scores = emit(aten._to_copy.default, scores, dtype=wide)
    if programs.scale != 1.0:
        scores = emit(aten.mul.Tensor, scores, programs.scale)
    places = _places(programs, scores, emit)
    scores = _run(programs.score, [scores, *places], programs.score_buffers, emit)
    if not _sees_all(programs.mask):
        visible = _run(programs.mask, places, programs.mask_buffers, emit)
        scores = emit(aten.where.ScalarOther, visible, scores, -math.inf)
    probabilities = emit(aten._safe_softmax.default, scores, -1)
    if dtype(probabilities) is not dtype(v):
        probabilities = emit(aten._to_copy.default, probabilities, dtype=dtype(v))
    results = (emit(aten.matmul.default, probabilities, v), scores, scores)
    for user in list(node.users):
        index = int(user.args[1]) if is_call(user, operator.getitem) else 0  # type: ignore[arg-type]
        if not user.users:
            continue
        result = results[index]
        if index:  # the logarithm of the sum, or the largest, in units of log 2
            reduced = (
                emit(aten.logsumexp.default, scores, [-1]) if index == 1 else emit(aten.amax.default, scores, [-1])
            )
            result = emit(aten.div.Tensor, reduced, math.log(2))
        user.replace_all_uses_with(result)
    for user in list(node.users):
        user.graph.erase_node(user)
    node.graph.erase_node(node)


def _places(programs: _Programs, scores: Node, emit: Emitter) -> list[Node]:
    """Batch, head, query and key of each score, which broadcast to all of them."""
    wanted = programs.mask.graph.find_nodes(op="placeholder")[0]
    options = {"dtype": dtype(wanted), "device": val(scores).device}
    found = []
    for axis, size in enumerate(emit.sizes(scores)):
        place = emit(aten.arange.default, size, **options)
        for _ in range(3 - axis):
            place = emit(aten.unsqueeze.default, place, -1)
        found.append(place)
    return found


def _run(program: GraphModule, numbers: list[Node], buffers: Any, emit: Emitter) -> Node:
    """What `program` makes of each number of `numbers`, on all at once."""
    copies: dict[Node, Any] = dict(zip(program.graph.find_nodes(op="placeholder"), [*numbers, *buffers], strict=True))
    rows: dict[Node, tuple[Node, list[Any]]] = {}  # an index into some of the axes of a buffer -> buffer, indices
    for node in program.graph.nodes:
        if node.op == "output":
            result = node.args[0]
            result = result[0] if isinstance(result, (tuple, list)) else result
            copied = copies[result]
            assert isinstance(copied, Node)
            return copied
        if node.op == "placeholder":
            continue
        if is_call(node, aten.index.Tensor):
            buffer, indices = rows.get(node.args[0], (copies.get(node.args[0]), []))
            indices = [*indices, *(copies[index] for index in node.args[1])]
            assert isinstance(buffer, Node)
            if len(indices) < len(shape(buffer)):
                rows[node] = buffer, indices
                continue
            copies[node] = emit(aten.index.Tensor, buffer, indices)
            continue
        args, kwargs = map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
        copies[node] = emit(node.target, *args, **kwargs)
    raise AssertionError("a graph has an output")


def _sees_all(mask: GraphModule) -> bool:
    """Whether the mask hides nothing: what flex_attention has where none was given."""
    (result,) = mask.graph.output_node().all_input_nodes or (None,)
    return is_call(result, aten.new_ones.default, aten.ones.default)
