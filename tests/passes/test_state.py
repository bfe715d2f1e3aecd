"""State is found in the graph: an input that is appended to and given back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from passes.graph import aten
from passes.quantize.sites import find_sites
from passes.state import cache_kind, states
from passes.testing import graph_of

PAST, NEW, QUERY = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)


def attention(q: Tensor, past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    return scaled_dot_product_attention(q, keys, values), keys, values


def written_out(q: Tensor, past_k: Tensor, past_v: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Heads repeated, and half precision between: as eager models have it."""
    keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    repeated = [x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(1, 4, 4, 8) for x in (keys, values)]
    scores = torch.cat([q, q], 1) @ repeated[0].transpose(2, 3) * 0.3
    return scores.softmax(-1).to(v.dtype) @ repeated[1], values, keys


def graph(function: object) -> GraphModule:
    return graph_of(function, QUERY, PAST, PAST.clone(), NEW, NEW.clone())  # type: ignore[arg-type]


@pytest.mark.parametrize(("function", "indices"), [(attention, [1, 2]), (written_out, [1, 2])])
def test_each_cache_is_found_with_its_input_and_output(function: object, indices: list[int]) -> None:
    found = list(states(graph(function).graph))
    assert [state.index for state in found] == indices
    assert {(state.past.name, *(new.name for new in state.new)) for state in found} == {
        ("past_k", "k"),
        ("past_v", "v"),
    }


@pytest.mark.parametrize("function", [attention, written_out])
def test_keys_are_told_from_values_by_who_reads_them(function: object) -> None:
    gm = graph(function)
    assert {state.past.name: cache_kind(state.update) for state in states(gm.graph)} == {"past_k": "k", "past_v": "v"}


def test_sites_have_the_names_of_recipes() -> None:
    names = [site.name for site in find_sites(graph(attention)) if site.operator.kind == "cache"]
    assert names == ["k_cache_quantizer", "v_cache_quantizer"]


@pytest.mark.parametrize(
    "result",
    [
        lambda past, new: torch.cat([past, new], 2) * 2,  # read, and something else given back
        lambda past, new: torch.cat([new, past], 2),  # nothing is appended to
        lambda past, new: torch.cat([past * 2, new], 2),
        lambda past, new: past + new,
    ],
)
def test_what_is_no_state(result: object) -> None:
    gm = graph_of(result, PAST, NEW)  # type: ignore[arg-type]
    assert not [state for state in states(gm.graph) if state.past.name == "past"]


def test_a_cache_that_no_attention_reads_has_no_quantizer() -> None:
    gm = graph_of(lambda past, new: torch.cat([past, new], 2), PAST, NEW)
    (state,) = states(gm.graph)
    assert cache_kind(state.update) is None
    assert not find_sites(gm)
    assert state.update.target is aten.cat.default
