"""`python -m passes show`: the graph of a saved program at any place of its way, and what one pass did to it.

The way is that of `qcompile.quantize` and of a back end. The form of a graph does not depend on its scales, and without
data there are none: a program in floating point gets 1 for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from passes.base import PassLog
from passes.errors import PassError
from passes.formats import Format, get_format
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.lower.device import Device
from passes.pipelines import (
    CANONICALIZE,
    NORMALIZE,
    PORTABLE,
    TENSORRT,
    TENSORRT_KERNELS,
    quantize_pipeline,
    torch_pipeline,
)
from passes.place.attention_scale import PlaceAttentionScale
from passes.program import unlift
from passes.quantize.insert import Quantizer
from passes.quantize.sites import Site, find_sites
from passes.subgraphs import all_calls, all_nodes
from passes.text import graph_text

__all__ = ["FOREIGN", "Step", "steps"]

Target = Literal["tensorrt", "portable", "inductor"]
FOREIGN = ("tensorrt", "quantized_decomposed", "torchao")
"""Namespaces of operators of tools that quantize."""


@dataclass(frozen=True)
class Step:
    """One pass on the way of a program.

    Attributes:
        name, stage: of the pass.
        log: what it did: `fired`, `declined`, `notices`.
        before, after: the graph as text.
    """

    name: str
    stage: str
    log: PassLog
    before: str
    after: str

    @property
    def fired(self) -> int:
        return self.log.fired[self.name]


def steps(program: ExportedProgram, target: Target = "tensorrt", fmt: str = "fp8") -> Iterator[Step]:
    """The passes over `program` in their order, each as it has run.

    Args:
        target: whose passes follow those of `qcompile.quantize`.
        fmt: what a program in floating point is quantized to, everywhere. One that is quantized stays as it is.
    """
    gm = unlift(program)
    nodes = list(all_nodes(gm))
    is_foreign = any(getattr(node.target, "namespace", None) in FOREIGN for node in nodes)
    if is_foreign:
        yield from _run((*CANONICALIZE, PlaceAttentionScale), gm)
        yield from _run(quantize_pipeline({}, None, torch.float32, torch.float32), gm)
    elif not any(all_calls(gm, QUANTIZE, DEQUANTIZE, DYNAMIC_QUANTIZE, ATTENTION)):
        yield from _run(NORMALIZE, gm)
        sites = [site for site in find_sites(gm) if not site.idle]
        queries = {site.consumer for site in sites if site.operand == "q"}
        yield from _run((partial(PlaceAttentionScale, queries),), gm)
        quantizers = _quantizers(sites, get_format(fmt))
        single = any(p.dtype is torch.float32 for p in gm.parameters())  # which becomes float16, as in `quantize`
        computed = torch.float16 if single else torch.float32
        yield from _run(quantize_pipeline(quantizers, None, torch.float32, computed), gm)
    if target == "inductor":
        yield from _run(torch_pipeline(Device("cpu")), gm)
    else:
        yield from _run((*TENSORRT_KERNELS, *TENSORRT) if target == "tensorrt" else PORTABLE, gm)


def _quantizers(sites: list[Site], fmt: Format) -> dict[Site, Quantizer]:
    """One for each of `sites` that recipes quantize: no results of layers, and probabilities are quantized later."""
    if fmt.sizes:
        raise PassError(f"{fmt.name} has scales in blocks: show takes fp8 and int8, or a program that is quantized")
    one = torch.tensor(1.0)
    return {site: Quantizer(fmt, one) for site in sites if site.operand not in ("output", "softmax")}


def _run(pipeline: Any, gm: GraphModule) -> Iterator[Step]:
    before = graph_text(gm)
    for make in pipeline:
        instance = make()
        instance.log, instance.recompiles = PassLog(), False
        instance(gm)
        after = graph_text(gm) if instance.log.fired.total() else before
        yield Step(instance.name, instance.stage, instance.log, before, after)
        before = after
