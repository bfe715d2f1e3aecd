"""Queries and keys that are normalized by head share one normalization."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant, constant
from passes.graph import Emitter, argument, aten, calls, dtype, is_call, name_in_module, only_user, shape
from passes.ir import QUANTIZE
from passes.state import past_of

__all__ = ["JoinHeadNorms"]


class JoinHeadNorms(Pass):
    """Normalize the heads of queries and keys together, and hand those of the values on beside them.

    Before:
        q, k, v = split(y, [Hq,Hk,Hv], dim=2)
        q, k = rms_norm(q, [D], wq, eps), rms_norm(k, [D], wk, eps)
    After:
        f = to(y, fp32)
        r = where([1]*Hq + [1]*Hk + [0]*Hv, rsqrt(mean(f * f, -1) + eps), 1)
        q, k, v = split(to(f * r, fp16) * [wq]*Hq + [wk]*Hk + [1]*Hv, [Hq,Hk,Hv], dim=2)

    Requires: `SplitPackedHeads` and `MergeParallelLinears` ran.
    Ensures: the arithmetic of `rms_norm` for what was normalized, the same numbers for what was not.
    Declines when: the norms differ in eps, or a weight is no constant.
    Why: TensorRT takes two kernels for each norm over the width of a head, as it does not join its mean with what
        follows, and another for the values' quantizer: five in place of two, in Qwen3.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for split in calls(gm.graph, aten.split_with_sizes.default):
            parts = [_Part.read(part) for part in split.users]
            norms = [part.norm for part in parts if part is not None and part.norm is not None]
            if len(norms) < 2 or len(norms) < len(parts) - 1 or None in parts or not _splits_heads(split):
                continue
            if len({part.index for part in parts if part is not None}) < len(parts):
                continue  # some heads are taken twice, and only one of the takers would be seen
            if len({argument(norm, "eps") for norm in norms}) > 1:
                self.decline("the norms of queries and keys add different numbers to the mean square", split)
            elif any(constant(gm, argument(norm, "weight")) is None for norm in norms):
                self.decline("a weight of the norms of queries and keys is no constant", split)
            else:
                _join(gm, split, {part.index: part for part in parts if part is not None})
                self.fire()


@dataclass(frozen=True)
class _Part:
    """Some heads: the output `index` of a split, which only `norm` reads; without one, only a quantizer or what appends
    to a cache."""

    node: Node
    index: int
    norm: Node | None

    @classmethod
    def read(cls, node: Node) -> _Part | None:
        """`node` as such a part; None if it is read otherwise."""
        user = only_user(node)
        if user is None or not is_call(node, operator.getitem):
            return None
        index = node.args[1]
        assert isinstance(index, int)
        if is_call(user, aten.rms_norm.default):
            whole = argument(user, "normalized_shape") == [shape(node)[-1]] and argument(user, "eps") is not None
            return cls(node, index, user) if whole and dtype(user) is dtype(node) else None
        while is_call(user, aten.transpose.int) and user is not None:
            user = only_user(user)
        read = user is not None and (is_call(user, QUANTIZE) or past_of(user) is not None)
        return cls(node, index, None) if read else None


def _splits_heads(split: Node) -> bool:
    """Whether `split` deals out heads `[B,S,H,D]` or `[B,H,S,D]` in half precision."""
    joined = split.args[0]
    assert isinstance(joined, Node)
    axis = int(argument(split, "dim")) % len(shape(joined))
    return len(shape(joined)) == 4 and axis in (1, 2) and dtype(joined) is not torch.float32


def _join(gm: GraphModule, split: Node, parts: dict[int, _Part]) -> None:
    joined, counts = split.args[:2]
    assert isinstance(joined, Node) and isinstance(counts, (list, tuple))
    norms = {index: part.norm for index, part in parts.items() if part.norm is not None}
    first = next(iter(norms.values()))
    emit = Emitter(split, like=first)
    rows, normalized = [], []
    for index, count in enumerate(counts):
        weight = constant(gm, argument(norms[index], "weight")) if index in norms else torch.ones(shape(joined)[-1])
        assert weight is not None
        rows.append(weight.detach().to(dtype(joined)).expand(count, -1))
        normalized.append(torch.full((count, 1), index in norms))
    tables = {"weights": torch.cat(rows), "normalized": torch.cat(normalized)}
    if int(argument(split, "dim")) % 4 == 1:
        tables = {name: table.unsqueeze(1) for name, table in tables.items()}
    of_heads = {n: add_constant(gm, name_in_module(first, f"head_{n}"), table, split) for n, table in tables.items()}
    wide = emit(aten._to_copy.default, joined, dtype=torch.float32)
    mean = emit(aten.mean.dim, emit(aten.mul.Tensor, wide, wide), [-1], True)
    root = emit(aten.rsqrt.default, emit(aten.add.Tensor, mean, argument(first, "eps")))
    factor = emit(aten.where.ScalarOther, of_heads["normalized"], root, 1.0)
    narrow = emit(aten._to_copy.default, emit(aten.mul.Tensor, wide, factor), dtype=dtype(joined))
    split.update_arg(0, emit(aten.mul.Tensor, narrow, of_heads["weights"]))
    for index, norm in norms.items():
        norm.replace_all_uses_with(parts[index].node)
