"""State that is written into, as choices place by place and as writes element by element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from passes.base import Pass
from passes.graph import aten
from passes.legalize.choose_written import ChooseWritten
from passes.legalize.scatter_written import ScatterWritten
from passes.testing import count, graph_of, rewrites

PAST, NEW = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 3, 4)
Start = torch.tensor([4])


def follow(past: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return past.index_copy(2, torch.arange(new.shape[2]) + start, new)


def put(past: Tensor, new: Tensor, start: Tensor) -> Any:
    return aten.index_put(past, [None, None, start + torch.arange(new.shape[2])], new)


def anywhere(past: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return past.index_copy(2, torch.tensor([6, 0, 3]) * (start - 3), new)


def fixed(past: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return past.slice_scatter(new * start, 2, 1, 4)


PASSES = pytest.mark.parametrize("rewrite", [ChooseWritten, ScatterWritten])


@PASSES
@pytest.mark.parametrize("written", [follow, put, anywhere, fixed])
def test_the_same_values_are_written(written: Callable[..., Tensor], rewrite: type[Pass]) -> None:
    gm = graph_of(written, PAST, NEW, Start)
    rewrites(rewrite, gm, PAST, NEW, Start)
    assert count(gm, aten.index_copy.default, aten.index_put.default, aten.slice_scatter.default) == 0
    assert count(gm, aten.argmax.default) == (written is anywhere and rewrite is ChooseWritten)


@PASSES
def test_a_dynamic_number_of_new_tokens(rewrite: type[Pass]) -> None:
    rewrites(rewrite, follow, PAST, NEW, Start, dynamic={"past": 0, "new": (0, 2)})


def test_one_token_is_chosen_without_a_look_up() -> None:
    gm = graph_of(follow, PAST, NEW[:, :, :1], Start)
    rewrites(ChooseWritten, gm, PAST, NEW[:, :, :1], Start)
    assert count(gm, aten.index_select.default) == 0


def test_keys_and_values_of_all_layers_share_what_is_chosen() -> None:
    def layers(keys: Tensor, values: Tensor, new: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(new.shape[2]) + start
        return keys.index_copy(2, positions, new), values.index_copy(2, positions, new)

    gm = graph_of(layers, PAST, PAST + 1, NEW, Start)
    rewrites(ChooseWritten, gm, PAST, PAST + 1, NEW, Start, fired=2)
    assert (count(gm, aten.where.self), count(gm, aten.clamp.default)) == (2, 1)


@PASSES
def test_what_is_no_state_stays(rewrite: type[Pass]) -> None:
    def forgotten(past: Tensor, new: Tensor, start: Tensor) -> Tensor:
        return follow(past, new, start).sum()

    def computed(past: Tensor, new: Tensor, start: Tensor) -> Tensor:
        return follow(past * 2, new, start)

    def added(past: Tensor, new: Tensor, start: Tensor) -> Any:
        return aten.index_put(past, [None, None, start + torch.arange(3)], new, accumulate=True)

    for kept in (forgotten, computed, added):
        gm = graph_of(kept, PAST, NEW, Start)
        rewrite()(gm)
        assert count(gm, aten.index_copy.default, aten.index_put.default) == 1
