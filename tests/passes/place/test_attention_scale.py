"""The attention scale in front of the query's quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.constants import constant
from passes.formats import FP8_PER_TOKEN
from passes.graph import argument
from passes.ir import QUANTIZE, quantize
from passes.place.attention_scale import PlaceAttentionScale, attention_scale
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run
from tests.passes.support import Attention, insert

S = torch.tensor(0.02)
ALL = {"q": S, "k": S, "v": S}


@pytest.mark.parametrize(("options", "factor"), [({}, 16**-0.5), ({"scale": 0.125}, 0.125), ({"scale": 0.3}, 0.3)])
@pytest.mark.parametrize("lengths", [None, {"x": {1: DYNAMIC}, "mask": None}], ids=["static", "dynamic"])
def test_the_scale_moves_to_the_query(options: dict[str, float], factor: float, lengths: object) -> None:
    gm = graph_of(Attention(width=16, **options), torch.randn(2, 5, 32), mask=None, dynamic_shapes=lengths)
    insert(gm, ALL)
    assert attention_scale(only_call(gm, SDPA)) == factor
    # a product by a power of two is exact; another one can round to the next code, one step of 1/16
    tolerance = {} if factor in (0.25, 0.125) else {"rtol": 0.1, "atol": 0.02}
    inputs = (torch.randn(2, 7 if lengths else 5, 32), None)
    rewrites(PlaceAttentionScale, gm, *inputs, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))
    node = only_call(gm, SDPA)
    assert argument(node, "scale") == 1.0
    codes = node.args[0].args[0]  # type: ignore[union-attr]
    torch.testing.assert_close(constant(gm, codes.args[1]), S * factor)
    assert codes.args[0].args[1] == factor


def test_the_codes_are_the_same_when_the_scale_is_a_power_of_two() -> None:
    x = torch.randn(1000)
    assert torch.equal(quantize(x, S, format="fp8").float(), quantize(x / 4, S / 4, format="fp8").float())


class TwoReaders(nn.Module):
    """Two attentions with scales of their own read one query, as does sin."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        first = nn.functional.scaled_dot_product_attention(q, k, k, scale=0.5)
        return first, nn.functional.scaled_dot_product_attention(q, k, k, scale=0.25), q.sin()


def test_another_reader_of_the_query_keeps_its_values() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    gm = graph_of(TwoReaders(), q, k)
    insert(gm, ALL)
    float_query = run(gm, q, k)[2]
    rewrites(PlaceAttentionScale, gm, q, k, fired=2, rtol=1e-5, atol=1e-6)
    assert torch.equal(run(gm, q, k)[2], float_query)
    # one of them is not rewritten: its pair stays as it was
    gm = graph_of(TwoReaders(), q, k)
    insert(gm, ALL)
    second = run(gm, q, k)[1]
    next(iter(gm.graph.find_nodes(op="call_function", target=SDPA))).update_kwarg("scale", 1.0)
    assert PlaceAttentionScale()(gm).modified
    torch.testing.assert_close(run(gm, q, k)[1], second, rtol=1e-5, atol=1e-6)
    assert count(gm, QUANTIZE) == 3


def test_a_float_query_and_a_scale_of_one_are_left_alone() -> None:
    x = torch.randn(1, 3, 16)
    gm = graph_of(Attention(), x)
    insert(gm, {"k": S})
    assert declines(PlaceAttentionScale, gm) == []
    gm = graph_of(Attention(scale=1.0), x)
    insert(gm, ALL)
    assert declines(PlaceAttentionScale, gm) == []


def test_a_query_that_will_be_quantized_is_multiplied_too() -> None:
    x = torch.randn(1, 3, 16)
    gm = graph_of(Attention(width=8), x)
    rewrites(lambda: PlaceAttentionScale([only_call(gm, SDPA)]), gm, x, rtol=1e-5, atol=1e-6)
    assert argument(only_call(gm, SDPA), "scale") == 1.0


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_no_quantizer_can_have_is_declined(scale: float) -> None:
    gm = graph_of(Attention(scale=scale), torch.randn(1, 3, 16))
    insert(gm, ALL)
    assert declines(PlaceAttentionScale, gm) == [
        "the attention scale is not positive, as the scale of a quantizer has to be"
    ]


@pytest.mark.parametrize("per_token", [True, False])
def test_a_scale_that_is_no_constant_scalar_is_declined(per_token: bool) -> None:
    gm = graph_of(Attention(), torch.randn(1, 3, 16))
    if per_token:
        InsertQdq({s: Quantizer(FP8_PER_TOKEN, None) for s in find_sites(gm) if s.operand == "q"})(gm)
    else:
        insert(gm, {"q": torch.full((1, 2, 1, 1), 0.02)})
    assert declines(PlaceAttentionScale, gm) == ["the query's scale is not a constant scalar"]
