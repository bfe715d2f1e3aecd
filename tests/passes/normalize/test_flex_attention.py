"""`flex_attention` with programs for scores and masks of many kinds, judged by torch's own eager implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from passes.base import run_pipeline
from passes.graph import argument, aten
from passes.normalize.flex_attention import SpellOutFlexAttention
from passes.pipelines import NORMALIZE
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """torch.export captures flex_attention through Dynamo, with the sizes of what that has compiled before."""
    torch._dynamo.reset()


S = 8
Q, K, V = (torch.randn(2, 2, S, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
Program = Callable[..., Tensor]


class Flex(nn.Module):
    """`flex_attention` with programs that may read buffers of the module."""

    table: Tensor
    slopes: Tensor
    documents: Tensor

    def __init__(self, score: Program | None = None, mask: Program | None = None, **options: Any) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(2, S, S))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25]))
        self.register_buffer("documents", torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1]]))
        self.score, self.options = score, options
        self.mask = None
        if mask is not None:
            self.mask = create_block_mask(lambda b, h, i, j: mask(self, b, h, i, j), 2, 2, S, S, device="cpu")

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        score = None if self.score is None else lambda s, b, h, i, j: self.score(self, s, b, h, i, j)  # type: ignore[misc]
        return flex_attention(q, k, v, score, self.mask, **self.options)


def causal(m: Flex, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


UNDERSTOOD: dict[str, Flex] = {
    "nothing": Flex(),
    "a scale": Flex(scale=0.3),
    "causal": Flex(mask=causal),
    "causal by scores": Flex(lambda m, s, b, h, i, j: torch.where(i >= j, s, -float("inf"))),
    "a window": Flex(mask=lambda m, b, h, i, j: (i - j).abs() < 3),
    "ALiBi": Flex(lambda m, s, b, h, i, j: s + m.slopes[h] * (j - i), causal),
    "a table": Flex(lambda m, s, b, h, i, j: s + m.table[h, i, j]),
    "a table, index by index": Flex(lambda m, s, b, h, i, j: m.table[h][i][j] + s),
    "documents": Flex(mask=lambda m, b, h, i, j: m.documents[b, i] == m.documents[b, j]),
    "a prefix": Flex(mask=lambda m, b, h, i, j: (j < 3) | (i >= j)),
}


@pytest.mark.everyday(1)
@pytest.mark.parametrize("model", UNDERSTOOD.values(), ids=UNDERSTOOD.keys())
def test_becomes_the_neutral_attention(model: Flex) -> None:
    gm = graph_of(model, Q, K, V)
    rewrites(SpellOutFlexAttention, gm, Q, K, V, rtol=1e-5, atol=1e-5)
    run_pipeline(NORMALIZE, gm)
    node = only_call(gm, SDPA)
    assert argument(node, "is_causal") == (model in (UNDERSTOOD["causal"], UNDERSTOOD["causal by scores"]))
    torch.testing.assert_close(gm(Q, K, V)[0], model(Q, K, V), rtol=1e-5, atol=1e-5)


def test_grouped_queries() -> None:
    model = Flex(mask=causal, enable_gqa=True)
    gm = graph_of(model, Q, K[:, :1], V[:, :1])
    rewrites(SpellOutFlexAttention, gm, Q, K[:, :1], V[:, :1], rtol=1e-5, atol=1e-5)
    run_pipeline(NORMALIZE, gm)
    assert argument(only_call(gm, SDPA), "enable_gqa")


def test_half_precision_computes_scores_in_float32() -> None:
    model = Flex(UNDERSTOOD["ALiBi"].score, causal)
    half = [x.half() for x in (Q, K, V)]
    gm = graph_of(model, *half)
    rewrites(SpellOutFlexAttention, gm, *half, rtol=2e-3, atol=2e-3)
    run_pipeline(NORMALIZE, gm)
    assert only_call(gm, SDPA).meta["val"].dtype is torch.float16


@pytest.mark.everyday(1)
@pytest.mark.parametrize("score", [None, lambda m, s, b, h, i, j: torch.tanh(s)], ids=["neutral", "written out"])
def test_a_query_that_sees_no_key_gets_zeros(score: Program | None) -> None:
    model = Flex(score, mask=lambda m, b, h, i, j: (i >= j) & (i != 3))
    gm = graph_of(model, Q, K, V)
    rewrites(SpellOutFlexAttention, gm, Q, K, V, rtol=1e-5, atol=1e-5)
    run_pipeline(NORMALIZE, gm)
    assert not gm(Q, K, V)[0][:, :, 3].any()


def test_a_program_reads_a_dynamic_size() -> None:
    class Ends(Flex):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
            return flex_attention(q, k, v, lambda s, b, h, i, j: s + 0.1 * (i - j + q.shape[2]))

    gm = graph_of(Ends(), Q, K, V, dynamic_shapes=({2: torch.export.Dim("length")},) * 3)
    rewrites(SpellOutFlexAttention, gm, Q, K, V, rtol=1e-5, atol=1e-5)


def test_dynamic_sizes() -> None:
    batch = torch.export.Dim("batch")
    gm = graph_of(Flex(), Q, K, V, dynamic_shapes=({0: batch, 2: DYNAMIC},) * 3)
    rewrites(SpellOutFlexAttention, gm, Q, K, V, rtol=1e-5, atol=1e-5)


def test_a_softcap_is_written_out_and_listed() -> None:
    gm = graph_of(Flex(lambda m, s, b, h, i, j: 20 * torch.tanh(s / 20)), Q, K, V)
    rewrites(SpellOutFlexAttention, gm, Q, K, V, rtol=1e-5, atol=1e-5)
    log = run_pipeline(NORMALIZE, gm)
    assert count(gm, aten._safe_softmax.default) == 1
    assert [decline.pass_name for decline in log.declined] == ["NormalizeAttention"]


def test_the_logarithm_of_the_sum() -> None:
    gm = graph_of(Flex(return_lse=True), Q, K, V)
    rewrites(SpellOutFlexAttention, gm, Q, K, V, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "score",
    [lambda m, s, b, h, i, j: s + m.table[h].sum(), lambda m, s, b, h, i, j: (s + m.slopes).amax()],
    ids=["a row", "a vector"],
)
def test_programs_on_more_than_numbers_stay(score: Program) -> None:
    (reason,) = declines(SpellOutFlexAttention, graph_of(Flex(score), Q, K, V))
    assert "stays as it is" in reason


def test_batches_that_broadcast_stay() -> None:
    (reason,) = declines(SpellOutFlexAttention, graph_of(Flex(mask=causal), Q, K[:1], V[:1]))
    assert "broadcast" in reason
