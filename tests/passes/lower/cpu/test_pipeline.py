"""The lowering for a CPU as a whole, compiled by Inductor with weights as inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node

from passes import ir
from passes.base import run_pipeline
from passes.constants import constant
from passes.fold.weights import FoldWeights
from passes.formats import FP8, FP8_1X128, FP8_128X128, FP8_PER_TOKEN, INT8, INT8_PER_TOKEN, NVFP4
from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.lower import int_mm
from passes.lower.cpu.pipeline import cpu_pipeline
from passes.lower.device import Device
from passes.lower.kernels import kernels
from passes.pipelines import NORMALIZE
from passes.place.attention_scale import PlaceAttentionScale
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, graph_of, run
from tests.passes.support import Mlp

REFERENCES: dict[Any, Callable[..., Any]] = {
    ir.QUANTIZE: ir.quantize,
    ir.DEQUANTIZE: ir.dequantize,
    ir.DYNAMIC_QUANTIZE: ir.dynamic_quantize,
    ir.ATTENTION: ir.attention,
    ir.BATCHED_LINEAR: ir.batched_linear,
}
S, G = torch.tensor(0.02), torch.tensor(0.0005)
FORMS = {
    "int8": (Quantizer(INT8, torch.full((1, 1), 0.004)), Quantizer(INT8, S), "int_mm"),
    "int8 per token": (Quantizer(INT8, torch.tensor(0.004)), Quantizer(INT8_PER_TOKEN, None), "int_mm"),
    "fp8": (Quantizer(FP8, S), Quantizer(FP8, S), "oneDNN"),
    "fp8 per token": (Quantizer(FP8, S), Quantizer(FP8_PER_TOKEN, None), "oneDNN"),
    "fp8 in blocks": (Quantizer(FP8_128X128, None), Quantizer(FP8_1X128, None), "oneDNN"),
    "nvfp4": (Quantizer(NVFP4, G), Quantizer(NVFP4, G), "oneDNN"),
    "nvfp4 weight": (Quantizer(NVFP4, G), None, "oneDNN"),
}


@pytest.fixture(autouse=True)
def cpu_with_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int_mm, "multiplies_int8", lambda: True)


def compiled(gm: GraphModule, *inputs: Any) -> Callable[..., list[Tensor]]:
    """`gm` by Inductor, its constants as inputs."""
    graph, copied, tensors = Graph(), dict[Node, Node](), []
    for node in gm.graph.find_nodes(op="get_attr"):
        copied[node] = graph.placeholder(f"constant_{len(tensors)}")
        tensors.append(constant(gm, node).detach())  # type: ignore[union-attr]
    for node in gm.graph.find_nodes(op="placeholder"):
        copied[node] = graph.node_copy(node)
    for node in gm.graph.nodes:
        if node not in copied:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    with torch.no_grad():
        function: Any = compile_fx(
            GraphModule({}, graph), [*tensors, *inputs], decompositions={**select_decomp_table(), **REFERENCES}
        )

    def call(*arguments: Any) -> list[Tensor]:
        with torch.no_grad():
            return list(function(*tensors, *arguments))

    return call


def quantized(module: nn.Module, *inputs: Any, form: str, **options: Any) -> GraphModule:
    weight, activation, _ = FORMS[form]
    wanted = {"weight": weight, "input": activation}
    gm = graph_of(module, *inputs, **options)
    chosen = {site: wanted.get(site.operand) for site in find_sites(gm)}
    InsertQdq({site: quantizer for site, quantizer in chosen.items() if quantizer is not None})(gm)
    FoldWeights()(gm)
    return gm


def lowered(gm: GraphModule) -> GraphModule:
    run_pipeline(cpu_pipeline(Device("cpu")), gm)
    code = gm.code
    run_pipeline(cpu_pipeline(Device("cpu")), gm)
    gm.recompile()
    assert gm.code == code
    return gm


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", *(pytest.param(f, marks=pytest.mark.slow) for f in FORMS if f != "fp8")])
def test_compiled_layers_equal_the_reference(form: str) -> None:
    """One layer each way round a ReLU: what a second layer rounds is the result of the first."""
    x = torch.randn(3, 5, 32)
    for layer in (nn.Linear(32, 24), nn.Sequential(nn.ReLU(), nn.Linear(32, 7, bias=False))):
        gm = quantized(layer, x, form=form)
        (expected,) = run(gm, x)
        (kernel,) = kernels(lowered(gm))
        assert FORMS[form][2] in kernel.kernel
        torch.testing.assert_close(compiled(gm, x)(x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["int8 per token", "fp8", "nvfp4"])
def test_a_dynamic_batch_compiles_once(form: str) -> None:
    gm = quantized(Mlp(32, 48), torch.randn(3, 5, 32), form=form, dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    x = torch.randn(4, 7, 32)
    (expected,) = run(gm, x)
    (got,) = run(lowered(gm), x)
    # a number that lies between two codes is rounded either way, after sums in another order
    assert (got - expected).abs().max() <= 0.05 * expected.abs().max()
    assert len(kernels(gm)) == 2


@pytest.mark.everyday(1)
@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_quantized_attention(is_causal: bool, to: torch.dtype) -> None:
    class Heads(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    q, k, v = (torch.randn(2, 4, 9, 16).to(to) for _ in range(3))
    gm = graph_of(Heads(), q, k, v)
    run_pipeline(NORMALIZE, gm)
    PlaceAttentionScale(set(gm.graph.find_nodes(op="call_function", target=SDPA)))(gm)
    sites = [site for site in find_sites(gm) if site.operand in "qkv"]
    InsertQdq({site: Quantizer(FP8, torch.tensor(0.01)) for site in sites})(gm)
    (attention,) = gm.graph.find_nodes(op="call_function", target=SDPA)
    FuseAttentionQdq({attention: torch.tensor(1 / 448)})(gm)
    assert gm.graph.find_nodes(op="call_function", target=ir.ATTENTION)
    (expected,) = run(gm, q, k, v)
    (got,) = compiled(lowered(gm), q, k, v)(q, k, v)
    # probabilities between two codes are rounded either way: by a sixteenth of one of them
    assert (got - expected).abs().float().mean() <= 2e-3 * expected.abs().float().mean()
