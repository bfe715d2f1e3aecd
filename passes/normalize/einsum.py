"""Einsums become permutations and matrix products."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import is_constant_expression
from passes.graph import Emitter, aten, calls, shape
from passes.normalize.attention_layout import is_one
from passes.normalize.contraction import Term, contract, permuted

__all__ = ["NormalizeEinsum"]

_DOTS = 0x3B1  # axes of dots are called by Greek letters


class NormalizeEinsum(Pass):
    """Rewrite einsums as matrix products, two operands at a time.

    Before:
        scores = einsum("B I H D, B J H D -> B H I J", q, k)
        y = einsum("...d, d h k -> ...hk", x, w)
    After:
        scores = matmul(permute(q, [0,2,1,3]), permute(k, [0,2,3,1]))
        y = reshape(matmul(x, reshape(w, [d,h*k])), [...,h,k])

    Requires: `ViewsToReshape` ran.
    Ensures: the same sums of products. What stays is spelled with small letters, without spaces and dots, as TensorRT
        wants it.
    Declines when: an operand has a label twice (a diagonal). Of constants alone, of a vector of constants, and of a
        batch of constant matrices, which `NormalizeExperts` reads, it stays without a note.
    Why: attention and linear layers then have one form.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.einsum.default):
            einsum = _Einsum.read(node)
            reason = einsum.misfit()
            if reason is not None:
                if reason:
                    self.decline(reason, node)
                if re.fullmatch(r"[a-z,]+->[a-z]*", str(node.args[0])) is None:
                    node.update_arg(0, einsum.spelled())
                    self.fire()
                continue
            node.replace_all_uses_with(einsum.as_products(Emitter(node)))
            self.fire()


@dataclass(frozen=True)
class _Einsum:
    """`terms` multiplied and summed over what is not in `result`; each axis of dots has a label of its own."""

    terms: list[Term]
    result: str

    @classmethod
    def read(cls, node: Node) -> _Einsum:
        equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
        assert isinstance(operands, (list, tuple))
        given, arrow, result = equation.partition("->")
        labels = given.split(",")
        ranks = [len(shape(operand)) - len(of.replace("...", "")) for operand, of in zip(operands, labels, strict=True)]
        dots = "".join(chr(_DOTS + axis) for axis in range(max(n for n, of in zip(ranks, labels, strict=True))))
        labels = [of.replace("...", dots[len(dots) - n :]) for n, of in zip(ranks, labels, strict=True)]
        if not arrow:
            joined = given.replace("...", "").replace(",", "")
            result = "..." + "".join(sorted(label for label in set(joined) if joined.count(label) == 1))
        terms = [Term(operand, of) for operand, of in zip(operands, labels, strict=True)]
        return cls(terms, result.replace("...", dots))

    def misfit(self) -> str | None:
        """Why this stays an einsum: empty if that needs no word; None if it does not stay."""
        if any(len(set(term.labels)) != len(term.labels) for term in self.terms):
            return "this einsum takes a diagonal"
        weights = [term for term in self.terms if is_constant_expression(term.node)]
        if len(weights) == len(self.terms):
            return ""
        if len(self.terms) == 2 and weights:
            summed = [label for label in weights[0].labels if label not in self.result]
            if len(weights[0].labels) == 1 and summed:
                return ""
            if len(weights[0].labels) == 3 and len(summed) == 1:
                return ""
        return None

    def spelled(self) -> str:
        """The equation in small letters, without spaces and dots."""
        labels = dict.fromkeys("".join(term.labels for term in self.terms))
        letters = str.maketrans(dict(zip(labels, string.ascii_letters[: len(labels)], strict=True)))
        return f"{','.join(term.labels for term in self.terms)}->{self.result}".translate(letters)

    def as_products(self, emit: Emitter) -> Node:
        """The result, by products of two operands from left to right."""
        terms = [self._squeezed(term, emit) for term in self.terms]
        found, *rest = (self._summed(term, terms, emit) for term in terms)
        for index, term in enumerate(rest):
            later = {label for other in rest[index + 1 :] for label in other.labels}
            found = contract(found, term, self.result + "".join(sorted(later - set(self.result))), emit)
        return permuted(found, self.result, emit).node

    def _squeezed(self, term: Term, emit: Emitter) -> Term:
        """`term` without axes of size 1 along which the sum goes over another operand."""
        for label in term.labels:
            sizes = [shape(other.node)[other.labels.index(label)] for other in self.terms if label in other.labels]
            axis = term.labels.index(label)
            if label not in self.result and is_one(shape(term.node)[axis]) and not all(map(is_one, sizes)):
                term = Term(emit(aten.squeeze.dim, term.node, axis), term.labels.replace(label, ""))
        return term

    def _summed(self, term: Term, terms: list[Term], emit: Emitter) -> Term:
        """`term` summed over axes that no other operand and not the result has."""
        used = {label for other in terms if other is not term for label in other.labels}
        alone = [axis for axis, label in enumerate(term.labels) if label not in used and label not in self.result]
        if not alone:
            return term
        kept = "".join(label for axis, label in enumerate(term.labels) if axis not in alone)
        return Term(emit(aten.sum.dim_IntList, term.node, alone), kept)
