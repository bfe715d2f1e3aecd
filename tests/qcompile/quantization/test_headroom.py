"""Values that leave float16: refused by name, told when near, masks aside; the report has what calibration saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qcompile
from passes.graph import aten
from passes.testing import graph_of
from qcompile.algorithms.statistics import LargestBeforeSoftmax, LargestScore
from qcompile.errors import CalibrationError, PassError
from qcompile.quantization.headroom import Watch
from qcompile.report.record import record_of

X = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
LIMIT = 65504.0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A residual stream with one outlier channel, as of T5, Gemma and diffusion transformers, and a head."""

    def __init__(self, outlier: float = 1.0, head: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.lm_head = nn.RMSNorm(32), nn.Linear(32, 32)
        self.blocks[0].up.weight.data *= outlier
        self.blocks[0].down.weight.data[3] *= outlier
        self.lm_head.weight.data *= head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def quantize(model: nn.Module, *args: Any, **options: Any) -> torch.export.ExportedProgram:
    options = {"calibration": [args or (X,)], "progress": False, **options}
    return qcompile.quantize(model.eval(), args or (X,), **options)


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.everyday(1)
@pytest.mark.parametrize("recipe", ["fp8", "fp8_per_channel_per_token"])
def test_a_residual_beyond_float16_is_refused_by_name_and_works_in_bfloat16(recipe: str) -> None:
    model = Net(outlier=5e3)
    with pytest.raises(CalibrationError) as caught:
        quantize(model, recipe=recipe)
    for words in ("blocks.0.down (", "blocks.0 (", "65504", "dtype=torch.bfloat16", "float32", "--dtype bfloat16"):
        assert words in str(caught.value)
    program = quantize(model, recipe=recipe, dtype=torch.bfloat16)
    assert torch.isfinite(program.module()(X)).all() and error(program.module()(X), model(X)) < 0.1


def test_an_unquantized_head_is_run_too() -> None:
    with pytest.raises(CalibrationError, match=r"in lm_head \("):
        quantize(Net(head=3e5))


def test_a_weight_beyond_float16_is_refused_before_calibration() -> None:
    model = Net()
    model.blocks[0].up.weight.data[0, 0] = 7e4
    with pytest.raises(
        PassError, match=r"blocks.0.up.weight_quantizer: the largest weight is 7e\+04.*--dtype bfloat16"
    ):
        quantize(model, calibration=iter(()))


def test_what_float16_nearly_loses_is_a_notice_and_the_report_has_the_headroom(tmp_path: Path) -> None:
    model = Net()
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.abs().max()))
    model(X)
    for parameter in model.lm_head.parameters():
        parameter.data *= 4e4 / seen[0].detach()
    report = qcompile.export_onnx(quantize(model), tmp_path / "m.onnx", target="portable")
    assert [n for n in report.notices if "within a factor of 1.64" in n and "lm_head (4e+04)" in n]
    worst = report.headroom[0]
    assert (worst.module, worst.amax) == ("lm_head", pytest.approx(4e4)) and worst.factor == pytest.approx(1.6376)
    assert [h.factor for h in report.headroom] == sorted(h.factor for h in report.headroom)
    assert {"blocks.0.up", "blocks.1.down", "blocks.1"} <= {h.module for h in report.headroom}
    assert json.loads(report.to_json())["headroom"][0] == {
        "module": "lm_head", "tensor": worst.tensor, "amax": worst.amax, "factor": worst.factor,
    }  # fmt: skip


def test_without_data_that_is_said_and_the_headroom_is_empty() -> None:
    record = record_of(quantize(Net(), recipe="fp8_per_channel_per_token", calibration=None))
    assert record.headroom == [] and any("no calibration data" in n and "65504" in n for n in record.notices)
    wide = record_of(quantize(Net(), recipe="fp8_per_channel_per_token", calibration=None, dtype=torch.bfloat16))
    assert not any("calibration" in n for n in wide.notices)


def test_a_state_beyond_float16_is_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[0].weight.data *= 3e5
    state = qcompile.calibrate(model, (X,), recipe="fp8", calibration=[X], progress=False)
    with pytest.raises(CalibrationError, match=r"larger ranges in 2.input_quantizer \(.*65504"):
        quantize(model, calibration=state)
    assert torch.isfinite(quantize(model, calibration=state, dtype=torch.float32).module()(X)).all()


def test_a_float16_model_that_overflows_by_itself_is_not_refused() -> None:
    model = Net(head=1e6).half()
    model.lm_head.weight.data.clamp_(-6e4, 6e4)
    record = record_of(quantize(model, X.half()))
    assert [n for n in record.notices if "this model itself left the range of its dtype in lm_head" in n]


class Attention(nn.Module):
    """Attention in one of the ways of models, with scores of about `scores`."""

    def __init__(self, way: str, scores: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.q, self.k = way, nn.Linear(32, 32), nn.Linear(32, 32)
        self.q.weight.data *= scores

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (self.q(x), self.k(x), x))
        keep = keep[:, None, None]
        lowest = torch.finfo(x.dtype).min
        if self.way == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, keep)
        scores = q @ k.transpose(-1, -2) / 4
        if self.way == "soft_cap":
            scores = (scores / 30).tanh() * 30
        added = torch.where(keep, 0.0, lowest)
        if self.way == "fill":
            scores = scores.masked_fill(~keep, lowest)
        elif self.way == "infinity":
            scores = scores.masked_fill(~keep, -torch.inf)
        elif self.way == "float":
            scores = scores + (1 - keep.float()) * -1e9
        else:
            scores = scores + added + (added if self.way == "twice" else 0)
        return scores.softmax(-1) @ v


WAYS = ["sdpa", "soft_cap", "fill", "infinity", "float", "add", "twice"]


@pytest.mark.everyday(2)
@pytest.mark.parametrize("way", WAYS)
def test_masks_are_no_values(way: str) -> None:
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[1, 5:] = False
    if way not in ("infinity", "twice", "sdpa"):  # NaN or zeros in the model itself
        keep[0] = False
    model = Attention(way)
    program = quantize(model, X, keep, recipe="fp8_gemm")
    record = record_of(program)
    assert not [n for n in record.notices if "factor" in n] and record.headroom[0].amax < 100
    found = program.module()(X, keep)
    assert torch.isfinite(found).all() or way in ("infinity", "twice")
    assert error(found[1], model(X, keep)[1]) < 0.1  # not of queries that see no key, which have no one answer


@pytest.mark.everyday(3)
@pytest.mark.parametrize("way", ["sdpa", "add", "fill"])
@pytest.mark.parametrize("recipe", ["fp8", "fp8_gemm"])
def test_scores_beyond_float16_are_found_in_every_spelling(way: str, recipe: str) -> None:
    keep = torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(CalibrationError, match="cannot hold in"):
        quantize(Attention(way, scores=3e5), X, keep, recipe=recipe)


@settings(max_examples=100, deadline=None)
@given(st.floats(1.0, 500.0), st.integers(0, 2**31), st.sampled_from([1, 2]))
@example(67.0, 4423679, 1)  # the head with the largest score is none that could have reached the limit
def test_the_bound_on_scores_misses_none(size: float, seed: int, heads: int) -> None:
    random = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, h, 5, 4, generator=random) * size for h in (2, heads))
    largest = LargestScore(0.5, LIMIT / 2)
    largest.update(None, (q, k), 1.0)
    scores = q.double() @ k.double().repeat_interleave(2 // heads, 1).transpose(-1, -2) * 0.5
    actual = float(scores.abs().max())
    if actual >= LIMIT / 2 or largest.reached:
        assert largest.finite == pytest.approx(actual, rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=16), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.sampled_from([-1e4, -32752.0, -65504.0, -1e9, torch.finfo(torch.float32).min, -torch.inf]),
)
def test_a_mask_counts_exactly_where_it_turns_a_row_into_nan(
    scores: list[list[float]], hidden: list[bool], mask: float
) -> None:
    plain = torch.tensor(scores)
    added = torch.where(torch.tensor(hidden[: plain.numel()]).reshape(plain.shape), mask, 0.0)
    masked = plain + added
    largest = LargestBeforeSoftmax(-1, LIMIT)
    largest.update(masked, (), 1.0)
    half = masked.clamp(-1e30, 1e30).half().softmax(-1)  # numpy's rounding: beyond 65520 is infinite
    alone = masked.isinf().all(-1)  # NaN in float32, too
    lost = bool((half.isnan().any(-1) & ~alone).any())
    if lost:
        assert largest.finite > LIMIT
    elif largest.finite > LIMIT:  # between the largest number and what rounds to infinity
        assert bool((masked.amax(-1) < -LIMIT).any())
    else:
        seen = masked.amax(-1) > -5e3
        torch.testing.assert_close(half[seen].double(), masked[seen].double().softmax(-1), atol=1e-3, rtol=1e-3)


class SparseAndSink(nn.Module):
    """Attention to the keys that an indexer chose among those that the mask leaves, and to a sink (HY v4)."""

    def __init__(self) -> None:
        super().__init__()
        self.index = nn.Linear(32, 32)
        self.sink = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        length, lowest = x.shape[1], torch.finfo(x.dtype).min
        seen = torch.ones(length, length, dtype=torch.bool).tril() & valid[:, None, None]
        mask = torch.where(seen, torch.zeros(()), lowest)
        places = (self.index(x) @ x.transpose(1, 2) + mask[:, 0]).topk(6).indices
        left = torch.ones(len(x), length, length, dtype=torch.bool).scatter(-1, places, False)
        scores = (x @ x.transpose(1, 2))[:, None] + mask.masked_fill(left[:, None], lowest)
        scores = torch.cat([scores, self.sink.expand(len(x), 1, length, 1)], -1)
        return (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ x[:, None]


def test_a_mask_that_a_choice_of_keys_reads_too_is_no_value() -> None:
    torch.manual_seed(0)
    model, valid = SparseAndSink(), torch.arange(8) < torch.tensor([[8], [6]])
    program = quantize(model, X, valid)
    assert max(h.amax for h in record_of(program).headroom) < 1e3
    assert error(program.module()(X, valid), model(X, valid)) < 0.05


def test_what_memory_held_before_it_is_written_is_no_value() -> None:
    class Filled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.new_empty(2, 8, 32)
            y[..., :32].copy_(x.relu())
            y[..., 32:].copy_(x[..., :0])  # keys of latent attention, no part of which is rotated
            return y

    watch = Watch(graph_of(Filled(), X), torch.float32, torch.float16)
    targets = {node.target for node in watch.statistics}
    assert aten.copy.default in targets and aten.new_empty.default not in targets
