"""The arguments of an attention by name, and another attention in its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from passes.sdpa import SDPA, Attention, attention_scale
from passes.testing import blank, only_call, returns, run

Q, K, V, M = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(3, 5)


def test_arguments_are_found_wherever_they_stand() -> None:
    _, emit, (q, k, v, m) = blank(Q, K, V, M)
    assert Attention.of(emit(SDPA, q, q, q)) == Attention(q, q, q, None, 0.0, False, None, False)
    given = emit(SDPA, q, k, v, m, 0.5, False, scale=2.0, enable_gqa=True)
    assert Attention.of(given) == Attention(q, k, v, m, 0.5, False, 2.0, True)
    assert Attention.of(emit(SDPA, q, k, v, is_causal=True, enable_gqa=True)).is_causal


@pytest.mark.parametrize("scale", [None, 2.0])
def test_what_is_put_in_its_place_computes_what_it_says(scale: float | None) -> None:
    gm, emit, (q, k, v, m) = blank(Q, K, V, M)
    node = emit(SDPA, q, k, v, scale=scale, enable_gqa=True)
    returns(gm, node)
    new = replace(Attention.of(node), mask=m).replace(node)
    assert only_call(gm, SDPA) is new
    assert new.args == (q, k, v, m, 0.0, False)
    assert new.kwargs == {"enable_gqa": True} | ({} if scale is None else {"scale": scale})
    (got,) = run(gm, Q, K, V, M)
    torch.testing.assert_close(got, scaled_dot_product_attention(Q, K, V, M, scale=scale, enable_gqa=True))
    plain = Attention(q, q, q).emit(emit)
    assert plain.kwargs == {}


def test_the_scale() -> None:
    _, emit, (q, k, v, _) = blank(Q, K, V, M)
    assert attention_scale(emit(SDPA, q, k, v, enable_gqa=True)) == 8**-0.5
    assert attention_scale(emit(SDPA, q, k, v, scale=0.0, enable_gqa=True)) == 0.0
