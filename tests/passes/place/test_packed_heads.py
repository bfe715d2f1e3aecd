"""Packed Q, K and V: one split along the heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.graph import aten, calls, is_call
from passes.normalize.views import ViewsToReshape
from passes.place.packed_heads import SplitPackedHeads
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run


class Packed(nn.Module):
    """Q, K and V of one linear layer; `take` is how a model tells them apart, `spy` what else it reads."""

    def __init__(self, take: str = "unbind", spy: str | None = None, axes: tuple[int, ...] = (2, 0, 3, 1, 4)) -> None:
        super().__init__()
        self.take, self.spy, self.axes = take, spy, axes
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Any:
        batch, length, _ = x.shape
        packed = self.qkv(x)
        view = packed.reshape(batch, length, 3, 2, 4)
        heads = view.permute(self.axes)
        q, k, v = heads.unbind(0) if self.take == "unbind" else (heads[0], heads[1], heads[-1])
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        other = {"packed": packed, "view": view, "heads": heads}
        return (y, other[self.spy] * 2) if self.spy else y


def packed(x: Tensor, *args: Any, dynamic_shapes: Any = None) -> GraphModule:
    gm = graph_of(Packed(*args), x, dynamic_shapes=dynamic_shapes)
    ViewsToReshape()(gm)
    return gm


@pytest.mark.parametrize("take", ["unbind", "select"])
def test_one_split_along_the_heads(take: str) -> None:
    x = torch.randn(2, 5, 8)
    gm = packed(x, take)
    rewrites(SplitPackedHeads, gm, x)
    assert only_call(gm, aten.split_with_sizes.default).args[1:] == ([2, 2, 2], 1)
    assert count(gm, aten.unbind.int, aten.select.int, aten.permute.default) == 0


def test_dynamic_batch_and_length() -> None:
    x = torch.randn(2, 5, 8)
    gm = packed(x, dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    rewrites(SplitPackedHeads, gm, x)
    run(gm, torch.randn(3, 7, 8))


def test_another_user_of_the_linear_keeps_its_values() -> None:
    x = torch.randn(2, 5, 8)
    rewrites(SplitPackedHeads, packed(x, "unbind", "packed"), x)


@pytest.mark.parametrize("spy", ["heads", "view"])
def test_declines_when_the_packed_heads_are_read_as_a_whole(spy: str) -> None:
    reasons = declines(SplitPackedHeads, packed(torch.randn(2, 5, 8), "unbind", spy))
    assert reasons == ["the packed heads are used in another way than one by one"]


def test_leaves_another_layout() -> None:
    assert declines(SplitPackedHeads, packed(torch.randn(2, 5, 8), "unbind", None, (2, 1, 3, 0, 4))) == []


H, D = 2, 4  # the layer makes 3 * H * D = 24 columns
FORMS: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "unbind": lambda y: [t.transpose(1, 2) for t in y.view(*y.shape[:2], 3, H, D).unbind(2)],
    "chunk": lambda y: [t.view(*t.shape[:2], H, D).transpose(1, 2) for t in y.chunk(3, -1)],
    "GPT-2": lambda y: [t.view(*t.shape[:2], H, D).transpose(1, 2) for t in y.split(H * D, 2)],
    "slices": lambda y: [y[..., i : i + H * D].unflatten(-1, (H, D)).transpose(1, 2) for i in (0, 8, 16)],
    "BLOOM": lambda y: [y.view(*y.shape[:2], H, 3, D)[..., i, :].transpose(1, 2) for i in range(3)],
    "ModernBERT": lambda y: y.view(*y.shape[:2], 3, H, D).transpose(3, 1).unbind(2),
    "copies": lambda y: [t.transpose(1, 2) for t in y.view(*y.shape[:2], 3, H, D).unbind(2)][::-1],
    "grouped": lambda y: [
        t.unflatten(-1, (-1, D)).transpose(1, 2) for t in (y[..., : 4 * D], y[..., 4 * D : 5 * D], y[..., 5 * D :])
    ],
    "heads behind": lambda y: [t.clone().cos().transpose(1, 2) for t in y.view(*y.shape[:2], 3, H, D).unbind(2)],
}


class OfForm(nn.Module):
    """One packed layer and an attention; `flat`: the layer multiplies a matrix, as GPT-2's does."""

    def __init__(self, form: Callable[[Tensor], Sequence[Tensor]], *, flat: bool = False) -> None:
        super().__init__()
        self.qkv, self.form, self.flat = nn.Linear(8, 24), form, flat

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x.reshape(-1, 8)).reshape(*x.shape[:2], 24) if self.flat else self.qkv(x)
        q, k, v = self.form(y)
        k, v = (t.expand(-1, q.shape[1], -1, -1) if t.shape[1] < q.shape[1] else t for t in (k, v))
        return (q.sin() @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.mark.everyday(5)
@pytest.mark.parametrize("dynamic", [None, ({0: DYNAMIC, 1: DYNAMIC},)], ids=["static", "dynamic"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_becomes_one_split(form: Callable[[Tensor], Sequence[Tensor]], flat: bool, dynamic: Any) -> None:
    x = torch.randn(2, 5, 8)
    gm = graph_of(OfForm(form, flat=flat), x, dynamic_shapes=dynamic)
    ViewsToReshape()(gm)
    rewrites(SplitPackedHeads, gm, x)
    (split,) = calls(gm.graph, aten.split_with_sizes.default)
    joined = split.args[0]
    assert is_call(joined, aten.transpose.int) and is_call(joined.args[0], aten.reshape.default)  # type: ignore[union-attr]
    assert count(gm, aten.unbind.int, aten.select.int, aten.slice.Tensor, aten.chunk.default) == 0


@pytest.mark.parametrize(
    "form",
    [
        lambda y: [t.unflatten(-1, (H, D)).transpose(1, 2) for t in (y[..., :8], y[..., 8:16], y[..., 8:16])],
        lambda y: [t.unflatten(-1, (H, D)).transpose(1, 2) for t in (y[..., :8], y[..., 4:12], y[..., 16:])],
    ],
    ids=["columns left over", "columns twice"],
)
def test_what_is_not_all_of_the_layer_stays(form: Callable[[Tensor], Sequence[Tensor]]) -> None:
    gm = graph_of(OfForm(form), torch.randn(2, 5, 8))
    ViewsToReshape()(gm)
    assert len(declines(SplitPackedHeads, gm)) == 1
