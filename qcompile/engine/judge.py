"""Judges a layer list against the file that it was built from: what fused, what ran in low precision, what did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from passes.capabilities import FUSED_ATTENTION, FusedAttention
from qcompile.engine.graph import OnnxGraph
from qcompile.engine.layers import LOW_PRECISION, Layer
from qcompile.engine.patterns import Attention, Gemm, find_attentions, find_gemms
from qcompile.engine.report import AttentionCount, NotLowPrecision, ProfileCounts
from qcompile.engine.shapes import head_dim, lengths

NO_KERNEL = "quantized in the file, but the builder has no kernel"
READER = "unless what reads its output next is a quantizer"


@dataclass(frozen=True)
class Judgement:
    """Of one profile: what it runs, the precisions and kernels of its modules as in the report, and `short_keys`: the
    attentions (module, keys) that too few keys kept from fusing."""

    counts: ProfileCounts
    precisions: dict[str, str]
    convolution_kernels: dict[str, int]
    short_keys: list[tuple[str, int]]

    @property
    def badness(self) -> tuple[int, int, int]:
        """Orders profiles: fewer attentions in low precision, then more left in high precision, then more kernels."""
        return -self.counts.attention.low_precision, len(self.counts.not_low_precision), self.counts.kernels


def judge(layers: list[Layer], graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]]) -> Judgement:
    """Count the kernels of one profile and explain what is not in low precision.

    Args:
        layers: one profile's part of the layer list.
        graph: the file.
        shapes: its static shapes at the smallest shapes of the profile.
    """
    kernels = [layer for layer in layers if layer.is_kernel]
    attentions = find_attentions(graph)
    products = find_gemms(graph, attentions)
    count, gaps, short, ran = _attentions(kernels, attentions, graph, shapes)
    found: dict[str, list[str]] = {}
    for product in products:
        kernel = _main_kernel(product, kernels)
        gaps.extend(_gemm_gap(product, kernel))
        if kernel is not None and not product.stays:
            found.setdefault(product.module, []).append(kernel.precision)
    precisions = {module: "+".join(sorted({*types})) for module, types in found.items()}
    of_attention = frozenset[str]().union(*(a.nodes for a in attentions))
    own = {product.name for product in products}
    gemms = [k for k in kernels if k.is_gemm and (own & set(k.onnx_nodes) or not of_attention & set(k.onnx_nodes))]
    convolutions = [k for k in kernels if k.is_convolution]
    low_rank = {product.name for product in products if product.is_low_rank}
    counts = ProfileCounts(
        kernels=len(kernels),
        attention=count,
        gemms=_by_precision(gemms),
        convolutions=_by_precision(convolutions),
        not_low_precision=gaps,
        low_rank=sum(not low_rank.isdisjoint(kernel.onnx_nodes) for kernel in gemms),
        attentions=ran,
    )
    return Judgement(counts, precisions, _convolution_kernels(products, kernels), short)


def _convolution_kernels(products: list[Gemm], kernels: list[Layer]) -> dict[str, int]:
    """Module -> how many kernels hold its convolution, a part of it, or the quantizer of its input."""
    found: Counter[str] = Counter()
    for product in products:
        if product.kind == "conv":
            own = {product.name, product.quantizer} - {""}
            found[product.module] += sum(not own.isdisjoint(kernel.onnx_nodes) for kernel in kernels)
    return dict(found)


def _by_precision(kernels: list[Layer]) -> dict[str, int]:
    return {p: sum(k.precision == p for k in kernels) for p in ("fp8", "fp4", "int8", "int4", "half", "float")}


def _attentions(
    kernels: list[Layer], attentions: list[Attention], graph: OnnxGraph, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[AttentionCount, list[NotLowPrecision], list[tuple[str, int]], dict[str, str]]:
    gaps: list[NotLowPrecision] = []
    ran: dict[str, str] = {}
    short: list[tuple[str, int]] = []
    precisions: list[str] = []
    present = {name for k in kernels for name in k.onnx_nodes}
    fused = [k for k in kernels if k.is_attention]
    unmatched = list(fused)
    for attention in attentions:
        if not attention.nodes & present:
            continue  # folded into a constant, or its result is not used
        mine = [k for k in fused if attention.nodes.intersection(k.onnx_nodes)]
        unmatched = [k for k in unmatched if k not in mine]
        precision = mine[0].precision if mine else "unfused"
        precisions.append(precision)
        ran[attention.module] = "+".join(sorted({*ran.get(attention.module, precision).split("+"), precision}))
        if precision not in LOW_PRECISION:
            parts = [k for k in kernels if attention.nodes.intersection(k.onnx_nodes)]
            why = _why_attention(attention, precision, parts, shapes)
            gaps.append(NotLowPrecision("attention", attention.module, why))
            _, keys = lengths(attention, shapes)
            takes = _kernel(attention)
            if not attention.unquantized and takes is not None and keys is not None and keys < takes.least_keys:
                short.append((attention.module, keys))
    for kernel in unmatched:  # an attention that was written in a way that the file's index does not know
        precisions.append(kernel.precision)
        name = graph.module(kernel.onnx_nodes[0]) if kernel.onnx_nodes else kernel.name
        ran[name] = kernel.precision
        if kernel.precision not in LOW_PRECISION:
            gaps.append(NotLowPrecision("attention", name, f"one fused kernel, in {kernel.precision}"))
    count = AttentionCount(
        total=len(precisions),
        fused=len(precisions) - precisions.count("unfused"),
        fp8=precisions.count("fp8"),
        int8=precisions.count("int8"),
    )
    return count, gaps, short, ran


def _kernel(attention: Attention) -> FusedAttention | None:
    return FUSED_ATTENTION.get(attention.format or "")


def unsupported_shape(attention: Attention, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a quantized attention of these shapes has no fused kernel; None when its shapes are no obstacle."""
    kernel = _kernel(attention)
    if kernel is None:
        return None
    queries, keys = lengths(attention, shapes)
    return kernel.unfit_length(queries, keys) or kernel.unfit_width(head_dim(attention, shapes))


def _why_attention(
    attention: Attention, precision: str, parts: list[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    state = "not fused" if precision == "unfused" else f"fused in {precision}"
    if len(attention.unquantized) == 4:
        return f"{state}: not quantized in the file"
    if attention.unquantized:
        return f"{state}: {', '.join(attention.unquantized)} not quantized in the file"
    if obstacle := unsupported_shape(attention, shapes):
        return f"{state}: {obstacle}"
    if attention.format == "int8" or any(k.is_gemm and k.outputs and k.outputs[0].datatype == "Float" for k in parts):
        return f"{state}: {NO_KERNEL} for this form, {READER}"
    if precision != "unfused":
        return f"{state}: {NO_KERNEL} for this shape"
    return f"{state}: {NO_KERNEL} for this form"


def _main_kernel(gemm: Gemm, kernels: list[Layer]) -> Layer | None:
    """The kernel that multiplies `gemm`; None when it was folded into a constant."""
    mine = [k for k in kernels if gemm.name in k.onnx_nodes]
    return next((k for k in mine if k.is_gemm or k.is_convolution), mine[0] if mine else None)


def _gemm_gap(gemm: Gemm, kernel: Layer | None) -> list[NotLowPrecision]:
    """The entry for a GEMM that ran in high precision; none when it ran low, or was folded into a constant."""
    if kernel is None:
        return []
    is_product = kernel.is_gemm or kernel.is_convolution
    if is_product and kernel.precision in LOW_PRECISION:
        return []
    ran = f"ran in {kernel.precision}" if is_product else f"computed by the pointwise kernel {kernel.name}"
    if gemm.is_rotation:
        why = "a Hadamard rotation, which is not quantized"
    elif gemm.is_low_rank:
        why = "the low-rank part of a quantized weight, which is not quantized"
    elif len(gemm.unquantized) == 2:
        why = "not quantized in the file"
    elif gemm.unquantized:
        why = f"{gemm.unquantized[0]} not quantized in the file"
    else:
        form = gemm.obstacle or "the builder does not multiply this form in low precision"
        why = f"quantized in the file, but {form}"
    return [NotLowPrecision(gemm.kind, gemm.module, f"{ran}: {why}")]
