"""Grouped queries over a cache, side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from passes.graph import aten
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE
from passes.legalize.group_queries import GroupQueries
from passes.testing import count, graph_of, rewrites

Q, K, V = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
MASK = torch.randn(2, 1, 3, 5)
S, P = torch.tensor(0.02), torch.tensor(1 / 448)


def _codes(x: Tensor) -> Tensor:
    return torch.ops.qcompile.quantize(x, S, format="fp8")  # type: ignore[no-any-return]


def _read(codes: Tensor) -> Tensor:
    return torch.ops.qcompile.dequantize(codes, S, format="fp8", dtype=torch.float32)  # type: ignore[no-any-return]


def attends(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    found = torch.ops.qcompile.attention(_read(_codes(q)), _read(k), _read(v), mask, P, is_causal=False, format="fp8")
    return found  # type: ignore[no-any-return]


def cached(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    keys, values = _codes(k), _codes(v)
    return attends(q, keys, values, mask), attends(q * 2, keys, values, mask), keys.float(), values.float()


def test_queries_of_a_group_are_side_by_side_and_the_mask_is_repeated_once() -> None:
    gm = graph_of(cached, Q, K, V, MASK)
    rewrites(GroupQueries, gm, Q, K, V, MASK, fired=2, rtol=1e-5, atol=1e-6)
    shapes = [node.args[0].meta["val"].shape for node in gm.graph.nodes if node.target is ATTENTION]
    assert shapes == [(2, 2, 6, 16)] * 2
    assert count(gm, aten.expand.default) == 1
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (4, 6)


def test_dynamic_sizes() -> None:
    sizes = {"q": (0, 2), "k": 0, "v": 0, "mask": (0, 2)}
    rewrites(GroupQueries, cached, Q, K, V, MASK, fired=2, dynamic=sizes, rtol=1e-5, atol=1e-6)


def test_others_stay() -> None:
    def not_kept(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attends(q, _codes(k), _codes(v), mask)

    for subject, query, mask in ((not_kept, Q, MASK), (cached, Q[:, :2], MASK), (cached, Q, MASK.expand(2, 4, 3, 5))):
        gm = graph_of(subject, query, K, V, mask)
        GroupQueries()(gm)
        assert count(gm, aten.reshape.default) == 0
    growing = graph_of(cached, Q, K, V, MASK, dynamic={"k": 2, "v": 2, "mask": 3})
    GroupQueries()(growing)
    assert count(growing, aten.reshape.default) == 0
