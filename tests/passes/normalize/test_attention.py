from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.testing import FileCheck

from passes.graph import aten, is_call
from passes.normalize.attention import NormalizeAttention
from passes.normalize.noops import RemoveNoOps
from passes.normalize.views import ViewsToReshape
from passes.sdpa import SDPA, Attention
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run

CLOSE = {"rtol": 1e-5, "atol": 2e-6}
HALF = {"rtol": 2e-3, "atol": 2e-3}
SCALE = 1 / math.sqrt(8)
MIN = torch.finfo(torch.float32).min


class Eager(nn.Module):
    """A function of q, k, v `[B, H, S, D]` and a padding mask `[B, S]`, true where a token is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.dropout = nn.Dropout(0.5)
        self.bias = nn.Parameter(torch.randn(1, 2, 5, 7))
        self.register_buffer("root", torch.tensor(math.sqrt(8)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Any:
        return self.function(self, q, k, v, padding)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 2, heads: int = 2) -> tuple[Tensor, ...]:
    padding = torch.ones(batch, 7, dtype=torch.bool)
    padding[-1, 4:] = False
    shapes = (5, 8), (7, 8), (7, 8)
    return (*(torch.randn(batch, heads, *shape, dtype=dtype) for shape in shapes), padding)


def prepared(function: Callable[..., Any], *args: Tensor, dynamic: Any = None) -> GraphModule:
    gm = graph_of(Eager(function), *(args or inputs()), dynamic_shapes=dynamic)
    ViewsToReshape()(gm)
    RemoveNoOps()(gm)
    return gm


def bert(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) * SCALE + torch.where(p[:, None, None, :], 0.0, MIN)
    return m.dropout(scores.softmax(-1)) @ v


def timm(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return m.dropout((q * SCALE @ k.transpose(-2, -1)).softmax(dim=-1)) @ v


def both_scaled(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return torch.matmul(q * SCALE**0.5, (k * SCALE**0.5).transpose(-2, -1)).softmax(3) @ v


def scaled_transposed(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-2, -1) * SCALE).softmax(-1) @ v


def divided(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.permute(0, 1, 3, 2) / math.sqrt(8)).softmax(-1) @ v


def divided_by_a_constant(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q / m.root @ k.mT).masked_fill(~p[:, None, None, :], -torch.inf).softmax(-1) @ v


def number_first(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (m.root * (q @ k.mT) / 8).softmax(-1) @ v


def two_masks(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE + m.bias
    return (scores + torch.where(p[:, None, None, :], 0.0, MIN / 2)).softmax(-1) @ v


def scaled_after_the_bias(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return ((q @ k.mT + m.bias) * SCALE).softmax(-1) @ v


def bias_and_where(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    scores = m.bias + q @ k.mT * SCALE
    return torch.where(p[:, None, None, :], scores, MIN).softmax(-1) @ v


def two_booleans(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    causal = torch.ones(5, 7, dtype=torch.bool).tril()
    scores = torch.where(causal, q @ k.mT * SCALE, MIN)
    return scores.masked_fill(~p[:, None, None, :], -1e9).softmax(-1) @ v


def fused_heads(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, x.shape[2], 8) for x in (q, k, v))
    return torch.bmm(torch.bmm(q * SCALE, k.transpose(1, 2)).softmax(-1), v).reshape(2, 2, 5, 8)


def fused_heads_with_mask(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """As BLOOM and OPT write it."""
    q, k, v = (x.reshape(4, x.shape[2], 8) for x in (q, k, v))
    scores = torch.bmm(q * SCALE, k.transpose(1, 2)).view(2, 2, 5, 7)
    scores = (scores + torch.where(p[:, None, None, :], 0.0, MIN)).view(4, 5, 7)
    return torch.bmm(scores.softmax(-1), v)


def baddbmm(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q, k, v = (x.reshape(4, x.shape[2], 8) for x in (q, k, v))
    bias = m.bias.expand(2, 2, 5, 7).reshape(4, 5, 7)
    return torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2), beta=0.5, alpha=SCALE).softmax(-1), v)


def windows(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """As torchvision's Swin adds a mask of shape `[windows, 1, N, N]`."""
    mask = torch.where(p[:, None, :], 0.0, -100.0).expand(2, 5, 7)
    scores = q @ k.mT * SCALE + m.bias
    scores = (scores.view(1, 2, 2, 5, 7) + mask[None, :, None]).view(2, 2, 5, 7)
    return scores.softmax(-1) @ v


def key_made_transposed(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    keys = k.transpose(1, 2).contiguous().permute(0, 2, 3, 1)
    return (q @ keys * SCALE).softmax(-1) @ v


def key_of_unknown_origin(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.reshape(2, 2, 8, 7).relu() * SCALE).softmax(-1) @ v


def one_key_head(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k[:, :1].transpose(-1, -2) * SCALE).softmax(-1) @ v[:, :1]


def low_level_softmax(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return aten._softmax.default(q @ k.mT * SCALE, -1, False) @ v


def five_axes(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q, k, v = (x.reshape(1, 2, 2, *x.shape[2:]) for x in (q, k, v))
    return (q @ k.mT * SCALE).softmax(-1) @ v


def five_axes_with_a_mask(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    q, k, v = (x.reshape(1, 2, 2, *x.shape[2:]) for x in (q, k, v))
    return (q @ k.mT * SCALE + torch.where(p[None, :, None, None, :], 0.0, MIN)).softmax(-1) @ v


def matrices(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q[0, 0] @ k[0, 0].T * SCALE + m.bias[0, 0]).softmax(-1) @ v[0, 0]


def matrices_by_mm(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return torch.mm((torch.addmm(m.bias[0, 0], q[0, 0], k[0, 0].T, alpha=SCALE)).softmax(-1), v[0, 0])


def one_query(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """As learned queries."""
    return (q[:1] @ k.mT * SCALE + m.bias).softmax(-1) @ v


def one_key_head_for_a_group(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    k, v = k[:, :1, None], v[:, :1, None]
    return (q[:, None] @ k.mT * SCALE).masked_fill(~p[:, None, None, None], -torch.inf).softmax(-1) @ v


def baddbmm_of_nothing(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """As BLOOM and Falcon write it: what is multiplied by zero is not read, and can be NaN."""
    q, k, v = (x.reshape(4, x.shape[2], 8) for x in (q, k, v))
    nothing = torch.full((4, 5, 7), torch.nan)
    return torch.bmm(torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=SCALE).softmax(-1), v)


def no_nan(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(~p[:, None, None, :], -torch.inf)
    return m.dropout(scores.softmax(-1).nan_to_num()) @ v


def zeros_where_hidden(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """As DeBERTa writes it."""
    hidden = ~p[:, None, None, :]
    return (q @ k.mT * SCALE).masked_fill(hidden, MIN).softmax(-1).masked_fill(hidden, 0) @ v


def zeros_where_hidden_by_where(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    scores = torch.where(p[:, None, None, :], q @ k.mT * SCALE, -1e9)
    return torch.where(p[:, None, None, :].expand(2, 2, 5, 7), scores.softmax(-1), 0.0) @ v


def times_the_mask(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    scores = torch.where(p[:, None, None, :], q @ k.mT * SCALE, -1e9)
    return (scores.softmax(-1) * p[:, None, None, :].float()) @ v


def gated_heads(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return ((q @ k.mT * SCALE).softmax(-1) * m.bias[:, :, :, :1].sigmoid() / 2) @ v


def transposed(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """As the autoencoder of latent diffusion writes it, with the channels first."""
    return (v.mT @ (q @ k.mT * SCALE).softmax(-1).permute(0, 1, 3, 2)).mT


def transposed_and_gated(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (v.mT.contiguous().relu() @ ((q @ k.mT * SCALE).softmax(-1) * m.bias[:, :, :, :1]).mT).mT


def transposed_by_its_softmax(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """As self-attention GANs write it, with the channels first: keys are rows."""
    return v.mT @ (k @ q.mT * SCALE).softmax(-2)


def transposed_before_its_softmax(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return ((k @ (q * SCALE).mT).mT + m.bias).softmax(-1) @ v


def one_bias_for_each_head(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """Of three axes, added to scores of four."""
    q, k, v = (x.reshape(4, x.shape[2], 8) for x in (q, k, v))
    scores = (torch.bmm(q * SCALE, k.mT).view(2, 2, 5, 7) + m.bias[0]).view(4, 5, 7)
    return torch.bmm(scores.softmax(-1), v)


def scaled_by_a_tensor_first(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return ((m.root * (q @ k.mT) + m.bias) / 8).softmax(-1) @ v


def gated_by_a_number(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return ((q @ k.mT * SCALE).softmax(-1) * m.bias[0, 0, 0, 0]) @ v


FORMS = (
    transposed_by_its_softmax,
    transposed_before_its_softmax,
    one_bias_for_each_head,
    scaled_by_a_tensor_first,
    gated_by_a_number,
    no_nan,
    zeros_where_hidden,
    zeros_where_hidden_by_where,
    times_the_mask,
    gated_heads,
    transposed,
    transposed_and_gated,
    matrices,
    matrices_by_mm,
    one_query,
    one_key_head_for_a_group,
    baddbmm_of_nothing,
    bert,
    timm,
    both_scaled,
    scaled_transposed,
    divided,
    divided_by_a_constant,
    number_first,
    two_masks,
    scaled_after_the_bias,
    bias_and_where,
    two_booleans,
    fused_heads,
    fused_heads_with_mask,
    baddbmm,
    windows,
    key_made_transposed,
    key_of_unknown_origin,
    one_key_head,
    low_level_softmax,
    five_axes,
    five_axes_with_a_mask,
)


@pytest.mark.everyday(5)
@pytest.mark.parametrize("form", FORMS)
def test_fires(form: Callable[..., Tensor]) -> None:
    args = inputs()
    gm = prepared(form, *args)
    rewrites(NormalizeAttention, gm, *args, **CLOSE)
    FileCheck().check_not("softmax").check_not("matmul").check_not("bmm").check("scaled_dot_product").run(gm.code)
    found = Attention.of(only_call(gm, SDPA))
    assert found.scale == pytest.approx(SCALE) and found.dropout == 0.0 and not found.is_causal
    for operand in (found.q, found.k, found.v):
        assert operand.meta["val"].ndim == 4


@pytest.mark.parametrize(("form", "permutes"), [(timm, 0), (divided, 0), (key_made_transposed, 1)])
def test_the_transpose_of_the_key_is_undone(form: Callable[..., Tensor], permutes: int) -> None:
    gm = prepared(form)
    NormalizeAttention()(gm)
    gm.graph.eliminate_dead_code()
    key = Attention.of(only_call(gm, SDPA)).k
    assert is_call(key, aten.permute.default) == bool(permutes)
    assert count(gm, aten.permute.default) == permutes


@pytest.mark.parametrize("form", [fused_heads_with_mask, fused_heads])
def test_reshapes_to_fused_heads_are_undone_where_the_model_shows_the_heads(form: Callable[..., Tensor]) -> None:
    gm = prepared(form)
    NormalizeAttention()(gm)
    shape = Attention.of(only_call(gm, SDPA)).q.meta["val"].shape
    assert shape[:2] == ((2, 2) if form is fused_heads_with_mask else (1, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_in_fp32_with_casts(dtype: torch.dtype) -> None:
    def llama(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        mask = torch.where(p[:, None, None, :], torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
        scores = torch.matmul(q, k.transpose(2, 3)) * SCALE + mask
        return torch.matmul(m.dropout(scores.softmax(-1, dtype=torch.float32).to(dtype)), v)

    args = inputs(dtype)
    gm = prepared(llama, *args)
    rewrites(NormalizeAttention, gm, *args, **(HALF if dtype is torch.float16 else {"rtol": 2e-2, "atol": 2e-2}))
    assert only_call(gm, SDPA).meta["val"].dtype is dtype
    assert count(gm, aten._to_copy.default) == 0


def test_a_gate_in_fp32_before_the_cast() -> None:
    def gated(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return ((q @ k.mT * SCALE).float().softmax(-1) * m.bias[:, :, :, :1]).half() @ v

    args = inputs(torch.float16)
    rewrites(NormalizeAttention, prepared(gated, *args), *args, **HALF)


def test_products_in_fp32() -> None:
    def wide(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        scores = q.float() @ k.float().mT * SCALE + torch.where(p[:, None, None, :], 0.0, -1e5)
        return scores.softmax(-1).half() @ v

    args = inputs(torch.float16)
    gm = prepared(wide, *args)
    rewrites(NormalizeAttention, gm, *args, **HALF)
    found = Attention.of(only_call(gm, SDPA))
    assert {n.meta["val"].dtype for n in (found.q, found.k, found.v)} == {torch.float16}


def returned_probabilities(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = (q @ k.mT).softmax(-1)
    return probabilities @ v, probabilities


def returned_scores(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    return (scores * SCALE).softmax(-1) @ v, scores


def capped(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return ((q @ k.mT).tanh() * SCALE).softmax(-1) @ v


def sink(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    scores = torch.cat([q @ k.mT * SCALE, m.bias[:, :, :, :1].expand(2, 2, 5, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def renormalized(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1) * p[:, None, None, :]
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


def mixed_heads(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """Talking heads."""
    mixing = m.bias[0, :, :2, 0]
    scores = nn.functional.linear((q @ k.mT).permute(0, 2, 3, 1), mixing).permute(0, 3, 1, 2)
    return nn.functional.linear(scores.softmax(-1).permute(0, 2, 3, 1), mixing).permute(0, 3, 1, 2) @ v


def half_hidden(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).masked_fill(~p[:, None, None, :], 0) @ v


def gated_keys(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * m.bias[:, :, :1]) @ v


def learned_scale(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.mT * m.bias[:, :, :1, :1]).softmax(-1) @ v


def filled_with_little(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~p[:, None, None, :], -10.0).softmax(-1) @ v


def broadcast_keys(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return torch.where(p[:, None, None, :], q @ k[:, :, :1].mT, MIN).softmax(-1) @ v


def over_queries(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def over_heads(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.mT).softmax(1) @ v


def sigmoid(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.mT * SCALE + m.bias).sigmoid() @ v


def squared_relu(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return v.mT @ (q @ k.mT * SCALE).relu().square().mT


def masked_softmax_by_hand(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    e = (q @ k.mT * SCALE).exp() * p[:, None, None, :]
    return e / e.sum(-1, keepdim=True) @ v


def rounded(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).to(torch.float8_e4m3fn).float() @ v


def rounded_scores(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.mT).to(torch.float8_e4m3fn).float().softmax(-1) @ v


def of_integers(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return ((q * 3).int() @ (k * 3).int().mT).float().softmax(-1) @ v


def not_a_number(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~p[:, None, None, :], torch.nan).softmax(-1) @ v


def other_heads(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """A bias is added to other leading axes, of the same number."""
    scores = (q @ k.mT).reshape(4, 1, 5, 7) + m.bias[0, :1].cumsum(-1).expand(4, 1, 5, 7)
    return scores.reshape(2, 2, 5, 7).softmax(-1) @ v


def one_vector(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """Attention pooling of a bag."""
    return (k[0, 0] @ q[0, 0, 0]).softmax(0) @ v[0, 0]


def one_key(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k[:, :, :1].mT).softmax(-1) @ v[:, :, :1]


def vectors(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (k[:, 0] @ q[0, 0, 0]).softmax(-1)[:, None] @ v[:, 0]


def mask_of_the_transpose(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (k @ q.mT + m.bias.mT).softmax(-2).mT @ v


def wide_value(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1).double() @ v.double()


DECLINED: list[tuple[Callable[..., Any], str]] = [
    (returned_probabilities, "the attention probabilities have another user"),
    (returned_scores, "have another user"),
    (sink, "or a column without a value"),
    (renormalized, "are changed before they meet the value"),
    (mixed_heads, "are changed before they meet the value"),
    (half_hidden, "to zero that the scores do not hide"),
    (gated_keys, "are changed before they meet the value"),
    (capped, "aten.tanh.default between the product of query and key and the softmax"),
    (learned_scale, "scales by something that is not a constant number"),
    (filled_with_little, "scores are replaced by something that is not a very negative number"),
    (broadcast_keys, "broadcasts the scores to another shape"),
    (wide_value, "query, key and value are torch.float32, torch.float32 and torch.float64"),
    (over_queries, "goes over axis -2, not over the keys"),
    (over_heads, "goes over axis 1, not over the keys"),
    (sigmoid, "aten.sigmoid.default makes the weights"),
    (squared_relu, "aten.relu.default makes the weights"),
    (masked_softmax_by_hand, "aten.exp.default makes the weights"),
    (rounded, "are changed before they meet the value"),
    (rounded_scores, "aten._to_copy.default between the product of query and key and the softmax"),
    (of_integers, "aten._to_copy.default between the product of query and key and the softmax"),
    (not_a_number, "scores are replaced by something that is not a very negative number"),
    (other_heads, "is added to scores of shape (4, 1, 5, 7)"),
    (one_key, "it attends to one key"),
    (one_vector, "query, key or value is a single vector"),
    (vectors, "are changed before they meet the value"),
    (mask_of_the_transpose, "is a mask of transposed scores"),
]


@pytest.mark.everyday(4)
@pytest.mark.parametrize(("form", "reason"), DECLINED)
def test_declines(form: Callable[..., Any], reason: str) -> None:
    (found,) = declines(NormalizeAttention, prepared(form))
    assert reason in found


@pytest.mark.parametrize(
    "form",
    [
        lambda m, q, k, v, p: q.softmax(-1),  # no product at all
        lambda m, q, k, v, p: v.mT @ k.relu().softmax(-1),  # of no product
        lambda m, q, k, v, p: v * (q @ k.mT).sigmoid().amax(2)[..., None],  # a gate
    ],
)
def test_leaves_what_is_no_attention(form: Callable[..., Tensor]) -> None:
    assert declines(NormalizeAttention, prepared(form)) == []


def test_second_user_of_the_scaled_query_keeps_it() -> None:
    def cached(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        q = q * SCALE
        return (q @ k.mT).softmax(-1) @ v, q

    args = inputs()
    gm = prepared(cached, *args)
    rewrites(NormalizeAttention, gm, *args, **CLOSE)
    assert count(gm, aten.mul.Tensor) == 1


@pytest.mark.everyday(1)
@pytest.mark.parametrize("form", [bert, timm, two_booleans])
def test_dynamic_shapes(form: Callable[..., Tensor]) -> None:
    args = inputs()
    axes = {0: DYNAMIC} if form is two_booleans else {0: DYNAMIC, 2: DYNAMIC}
    last = {0: DYNAMIC} if form is two_booleans else {0: DYNAMIC, 1: DYNAMIC}
    gm = prepared(form, *args, dynamic=(axes, axes, axes, last))
    rewrites(NormalizeAttention, gm, *args, **CLOSE)


@pytest.mark.parametrize("split", [False, True])
def test_dynamic_fused_heads(split: bool) -> None:
    def fused(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        batch = q.shape[0]
        q, k, v = (x.reshape(batch * 2, -1, 8) for x in (q, k, v))
        scores = torch.bmm(q * SCALE, k.transpose(1, 2))
        if split:
            mask = torch.where(p[:, None, None, :], 0.0, MIN)
            scores = (scores.view(batch, 2, q.shape[1], k.shape[1]) + mask).view(-1, q.shape[1], k.shape[1])
        return torch.bmm(scores.softmax(-1), v)

    args = inputs()
    gm = prepared(fused, *args, dynamic=({0: DYNAMIC, 2: DYNAMIC},) * 3 + ({0: DYNAMIC, 1: DYNAMIC},))
    rewrites(NormalizeAttention, gm, *args, **CLOSE)


PLACES = st.lists(st.sampled_from(["query", "key", "scores", "after"]), max_size=4)
MASKS = st.lists(st.sampled_from(["bias", "where", "fill", "additive"]), max_size=3)


@settings(max_examples=6)
@given(PLACES, MASKS, st.floats(0.2, 2), st.booleans(), st.integers(1, 3))
def test_any_order_of_scales_and_masks(
    places: list[str], masks: list[str], factor: float, divide: bool, batch: int
) -> None:
    def scaled(x: Tensor, place: str) -> Tensor:
        for _ in range(places.count(place)):
            x = x / factor if divide else x * factor
        return x

    def form(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        scores = scaled(scaled(q, "query") @ scaled(k, "key").mT, "scores")
        for mask in masks:
            if mask == "bias":
                scores = m.bias + scores
            elif mask == "additive":
                scores = scores + torch.where(p[:, None, None, :], 0.0, -1e6)
            elif mask == "where":
                scores = torch.where(p[:, None, None, :], scores, -1e7)
            else:
                scores = scores.masked_fill(~p[:, None, None, :], -1e7)
        return scaled(scores, "after").softmax(-1) @ v

    args = inputs(batch=batch)
    gm = prepared(form, *args)
    rewrites(NormalizeAttention, gm, *args, rtol=1e-4, atol=1e-5)


def wide_mask(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    mask = torch.where(p[:, None, None, :], 0.0, MIN) + m.bias
    return ((q @ k.mT).float() + mask).softmax(-1).to(q.dtype) @ v


def bias_and_half_where(m: Eager, q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
    scores = m.bias.to(q.dtype) + q @ k.mT
    return torch.where(p[:, None, None, :], scores, torch.finfo(q.dtype).min).softmax(-1) @ v


@pytest.mark.parametrize("form", [wide_mask, bias_and_half_where], ids=lambda f: f.__name__)
def test_a_score_added_to_a_mask_does_not_become_infinite(form: Callable[..., Any]) -> None:
    """-65504 and a score of -512 are -inf in float16: a row that is hidden as a whole would be NaN."""
    *qkv, padding = inputs(torch.float16)
    padding[-1] = False
    gm = prepared(form, *qkv, padding)
    (want,) = run(gm, *qkv, padding)
    NormalizeAttention()(gm)
    (got,) = run(gm, *qkv, padding)
    torch.testing.assert_close(got[0], want[0], **HALF)  # of the row, only that it is finite
    assert got.isfinite().all()
    output, mask = gm.graph.output_node(), only_call(gm, SDPA).args[3]
    output.args = ((mask,),)
    (added,) = run(gm, *qkv, padding)
    assert added.dtype is torch.float16 and (added - 512).isfinite().all()
    assert bool((added[-1] < -3e4).all())
