"""A cache goes in and out as codes, and only what is new is quantized."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention

from passes.base import PassLog, run_pipeline
from passes.formats import FP8, INT8, Format
from passes.fuse.caches import StoreCaches
from passes.graph import aten, dtype
from passes.ir import DEQUANTIZE, QUANTIZE, dequantize, quantize
from passes.legalize.cached_codes import AppendInFloat
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.state import states
from passes.subgraphs import copied_graph
from passes.testing import DYNAMIC, count, graph_of, run


class Cached(nn.Module):
    """Attention that appends to its cache; `reads` returns what is given, too."""

    def __init__(self, *, reads: bool = False) -> None:
        super().__init__()
        self.reads = reads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        more = (past_k.sum(-1),) if self.reads else ()
        return scaled_dot_product_attention(q, keys, values), keys, values, *more


NAMES = ("q", "k", "v", "past_k", "past_v")


def inputs(past: int = 3, new: int = 2) -> list[Tensor]:
    lengths = (new, new, new, past, past)
    return [
        torch.randn(1, 2, length, 8, generator=torch.Generator().manual_seed(i)) for i, length in enumerate(lengths)
    ]


@lru_cache
def captured(reads: bool) -> GraphModule:
    return graph_of(Cached(reads=reads), *inputs(), dynamic_shapes={name: {2: DYNAMIC} for name in NAMES})


def quantized(fmt: Format, scales: tuple[float, float], *, reads: bool = False) -> GraphModule:
    gm = copied_graph(captured(reads))
    by_name = dict(zip("kv", scales, strict=True))
    sites = {s: Quantizer(fmt, torch.tensor(by_name[s.operand[0]])) for s in find_sites(gm) if "cache" in s.operand}
    InsertQdq(sites)(gm)
    return gm


@pytest.mark.parametrize("fmt", [FP8, INT8], ids=["fp8", "int8"])
@given(st.integers(0, 5), st.integers(1, 4), st.integers(-12, 2), st.floats(0.5, 1))
def test_the_codes_are_those_of_the_graph_before(fmt: Format, past: int, new: int, exponent: int, part: float) -> None:
    scales = (2.0**exponent * part, 2.0**exponent)
    gm, stored, lowered = (quantized(fmt, scales) for _ in range(3))
    assert StoreCaches()(stored).modified
    log = run_pipeline((StoreCaches, AppendInFloat), lowered, PassLog())
    assert (log.fired["StoreCaches"], log.fired["AppendInFloat"]) == (2, 2)
    q, k, v, *old = inputs(past, new)
    codes = [quantize(x, torch.tensor(s), format=fmt.name) for x, s in zip(old, scales, strict=True)]
    values = [
        dequantize(c, torch.tensor(s), format=fmt.name, dtype=q.dtype) for c, s in zip(codes, scales, strict=True)
    ]
    wanted = run(gm, q, k, v, *values)
    for other in (stored, lowered):
        out, *caches = run(other, q, k, v, *codes)
        torch.testing.assert_close(out, wanted[0], rtol=1e-6, atol=1e-6)
        for cache, expected, s in zip(caches, wanted[1:], scales, strict=True):
            assert cache.dtype is fmt.storage
            same = dequantize(cache, torch.tensor(s), format=fmt.name, dtype=q.dtype)
            torch.testing.assert_close(same, expected, rtol=0, atol=0)


def test_only_what_is_new_is_quantized() -> None:
    gm = quantized(FP8, (0.1, 0.1))
    StoreCaches()(gm)
    assert [str(node.args[0]) for node in gm.graph.find_nodes(op="call_function", target=QUANTIZE)] == ["k", "v"]
    assert (count(gm, aten.cat.default), count(gm, DEQUANTIZE)) == (2, 2)
    assert [state.past.name for state in states(gm.graph)] == ["past_k", "past_v"]


def test_without_a_quantizer_it_is_in_the_compute_dtype() -> None:
    gm = graph_of(Cached(), *inputs())
    log = run_pipeline((lambda: ConvertComputeDtype(torch.float32, torch.float16), StoreCaches), gm, PassLog())
    assert log.fired["StoreCaches"] == 2
    assert [dtype(node) for node in gm.graph.find_nodes(op="placeholder")][3:] == [torch.float16] * 2
    out, *caches = run(gm, *inputs()[:3], *(x.half() for x in inputs()[3:]))
    assert (out.dtype, *(cache.dtype for cache in caches)) == (torch.float32, torch.float16, torch.float16)
    assert not StoreCaches()(gm).modified


def test_a_cache_with_another_reader_stays() -> None:
    gm = quantized(FP8, (0.1, 0.1), reads=True)
    log = run_pipeline((StoreCaches,), gm, PassLog())
    assert log.fired["StoreCaches"] == 1
    assert [decline.reason for decline in log.declined] == [
        "the cache that is given is read by something else than what appends to it"
    ]
