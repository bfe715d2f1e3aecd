"""Turns what TensorRT says into one message: the reason without its noise, a hint, and the modules concerned."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qcompile.engine.graph import OnnxGraph
from qcompile.engine.judge import unsupported_shape
from qcompile.engine.patterns import find_attentions
from qcompile.engine.profiles import ShapeProfile

# Follows an unrelated failure on a machine without a GPU, and is never the reason.
_NOISE = re.compile(r"catchCudaError|CUDA driver version is insufficient|^ModelImporter\.cpp")

_HINTS = (
    (r"Cannot compile for target.*fp4", "NVFP4 needs sm100 or newer: build for sm120, or use the recipe fp8"),
    (r"Cannot compile for target.*fp8", "FP8 needs sm89 or newer: build for sm89 or sm120, or use the recipe int8"),
    (
        r"not supported by a dedicated kernel",
        "an attention has no fused kernel at its shape (fewer than 32 keys, or heads above 256): use longer sequences, "
        "leave that attention unquantized, or set TRT_decomposable = 1 on the operator",
    ),
    (r"have to be the same type", "a Q/DQ pair of a GEMM has no FP8 zero point, so its data is read as INT8"),
    (
        r"must all be positive",
        "a scale is 0, or underflows in its type: calibrate with data that is not all zero; or it is negative: "
        "qcompile repair negates its codes",
    ),
    (r"Non-zero zero point", "TensorRT multiplies symmetric INT8 only: qcompile repair moves zero points into biases"),
    (r"Plugin not found", "TensorRT does not know this operator: export with target='tensorrt' or 'portable'"),
    (
        r"dtype == myelinTypeFloat .* dtype == myelinTypeFP8E4M3",
        "TensorRT-RTX before 1.7 has no INT8 convolutions: build with 1.7, by route='onnx', or use the recipe fp8",
    ),
    (r"same input types|must have the same type", "two operands have different types: a Cast is missing in the file"),
)


def first(messages: Sequence[str]) -> str:
    """The first message that says something, without the builder's own source locations."""
    told = [m for m in messages if m.strip() and not _NOISE.search(m)] or ["it gave no reason"]
    text = re.sub(r"\s+In \w+ at /\S+\.(cpp|h):\d+\)?", "", told[0]).strip()
    text = re.sub(r"^IBuilder::\w+: Error Code \d+: (Myelin \(\[[^\]]*\] )?", "", text)
    text = re.sub(r"^MyelinCheckException: \S+: ", "", text)
    text = re.sub(r" Please set k\w+ .* on DLA\.", "", text)  # another chip than what is built for
    said = re.fullmatch(r'(?:Assertion failed: )?\w+ && "(.+)"', text) or re.search(
        r"Assertion failed: .+?: (.+)", text
    )
    text = said[1] if said else text
    return "it gave no reason" if re.fullmatch(r"(Assertion failed: )?(false)?[:\s]*", text) else text


def with_hint(message: str) -> str:
    """The message, followed by what to do about it where that is known."""
    return message + next((f"\n  hint: {hint}" for pattern, hint in _HINTS if re.search(pattern, message)), "")


def suspects(graph: OnnxGraph, profiles: Sequence[ShapeProfile]) -> list[str]:
    """The attentions that have no fused kernel at the smallest shapes: the builder does not say which one it means."""
    minima: list[dict[str, Sequence[int]]] = [{n: s[0] for n, s in p.items()} for p in profiles] or [{}]
    found = {}
    for shapes in (graph.static_shapes(m) for m in minima):
        for attention in find_attentions(graph):
            if obstacle := unsupported_shape(attention, shapes):
                found[attention.module] = f"{attention.module}: {obstacle}"
    return list(found.values())
