"""The sum of products of two tensors over some of their axes, as one matrix product.

Used by `NormalizeEinsum`. An axis has a label, one letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from passes.constants import is_constant_expression
from passes.graph import Emitter, aten
from passes.normalize.attention_layout import merged

__all__ = ["Term", "contract", "permuted"]


@dataclass(frozen=True)
class Term:
    """A tensor with a label for each of its axes."""

    node: Node
    labels: str

    def sizes(self, emit: Emitter) -> dict[str, Any]:
        """The size of each axis as an argument of an operator."""
        return dict(zip(self.labels, emit.sizes(self.node), strict=True))


def permuted(term: Term, labels: str, emit: Emitter) -> Term:
    """`term` with its axes in the order of `labels`."""
    axes = [term.labels.index(label) for label in labels]
    if axes == sorted(axes):
        return term
    return Term(emit(aten.permute.default, term.node, axes), labels)


def contract(a: Term, b: Term, kept: str, emit: Emitter) -> Term:
    """The product of `a` and `b`, summed over the labels that both have and `kept` has not.

    Args:
        kept: every label that is used later, in the order in which the axes are wanted in the end.
    """
    shared = [label for label in a.labels if label in b.labels]
    summed = [label for label in shared if label not in kept]
    if not summed:
        return _outer(a, b, kept, emit)
    left, right = (b, a) if _is_right(a, b, kept) else (a, b)
    return _matmul(left, right, [label for label in kept if label in shared], summed, kept, emit)


def _is_right(a: Term, b: Term, kept: str) -> bool:
    """Whether `a` is better the right operand: a weight, or what has the last axis of the result."""
    weights = is_constant_expression(a.node), is_constant_expression(b.node)
    if weights[0] != weights[1]:
        return weights[0]
    last = next((label for label in reversed(kept) if (label in a.labels) != (label in b.labels)), "")
    return last != "" and last in a.labels


def _matmul(left: Term, right: Term, batch: list[str], summed: list[str], kept: str, emit: Emitter) -> Term:
    """`matmul(left [batch, M..., K], right [batch, 1..., K, N])`."""
    order = kept
    if left.labels.endswith("".join(summed)) and left.labels.startswith("".join(sorted(batch, key=left.labels.index))):
        order, batch = left.labels, sorted(batch, key=left.labels.index)  # probabilities stay as they are
    rows = [label for label in order if label in left.labels and label not in batch and label not in summed]
    columns = [label for label in kept if label in right.labels and label not in batch]
    of_left, of_right = left.sizes(emit), right.sizes(emit)
    sizes = {**of_right, **{label: size for label, size in of_left.items() if size != 1 or label not in of_right}}
    x = permuted(left, "".join([*batch, *rows, *summed]), emit).node
    w = permuted(right, "".join([*batch, *summed, *columns]), emit).node
    depth, width = merged([sizes[label] for label in summed]), merged([sizes[label] for label in columns])
    if len(summed) > 1:
        x = emit(aten.reshape.default, x, [*(of_left[label] for label in (*batch, *rows)), depth])
    if depth == width == -1:  # one at a time
        w = emit(aten.reshape.default, w, [*(of_right[label] for label in batch), -1, *(of_right[n] for n in columns)])
        depth = emit.sizes(w)[len(batch)]
    if len(summed) > 1 or len(columns) > 1:
        w = emit(aten.reshape.default, w, [*(of_right[label] for label in batch), depth, *([width] if columns else [])])
    if not rows:
        x = emit(aten.unsqueeze.default, x, len(batch))
    if not columns:
        w = emit(aten.unsqueeze.default, w, len(batch) + 1)
    for _ in range(len(rows) - 1 if batch else 0):
        w = emit(aten.unsqueeze.default, w, len(batch))
    result = emit(aten.matmul.default, x, w)
    if not columns:
        result = emit(aten.squeeze.dim, result, -1)
    elif len(columns) > 1:
        inner = [sizes[label] for label in rows] or [1]
        shape = [*(sizes[label] for label in batch), *inner, *(sizes[label] for label in columns)]
        result = emit(aten.reshape.default, result, shape)
    if not rows:
        result = emit(aten.squeeze.dim, result, len(batch))
    return Term(result, "".join([*batch, *rows, *columns]))


def _outer(a: Term, b: Term, kept: str, emit: Emitter) -> Term:
    """The product of each element with each, and with its own along axes that both have."""
    labels = "".join(label for label in kept if label in a.labels or label in b.labels)
    sides = []
    for term in (a, b):
        node = permuted(term, "".join(label for label in labels if label in term.labels), emit).node
        for axis, label in enumerate(labels):
            if label not in term.labels:
                node = emit(aten.unsqueeze.default, node, axis)
        sides.append(node)
    return Term(emit(aten.mul.Tensor, *sides), labels)
