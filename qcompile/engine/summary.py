"""Makes the report of a build: each profile judged, the worst in front, and what a reader should know of it."""

from __future__ import annotations

from collections.abc import Sequence

from passes.capabilities import FUSED_ATTENTION
from qcompile.engine.backend import Backend
from qcompile.engine.judge import NO_KERNEL, READER, Judgement, judge
from qcompile.engine.layers import OTHER, Layer
from qcompile.engine.profiles import ShapeProfile
from qcompile.engine.report import EngineReport
from qcompile.engine.trt_build import Built

_MIN_KEYS = FUSED_ATTENTION["fp8"].least_keys  # INT8 takes any


def summarize(built: Built, backend: Backend, seconds: float, names: Sequence[str] = ()) -> EngineReport:
    """Judge the layers of each profile, which may have `names`, against the graph that they were built from."""
    judged = []
    for index in range(max(1, len(built.profiles))):
        minima = {name: shapes[0] for name, shapes in built.profiles[index].items()} if built.profiles else {}
        mine = [layer for layer in built.layers if layer.profile == index]
        judged.append(judge(mine, built.graph, built.graph.static_shapes(minima)))
    worst = max(range(len(judged)), key=lambda index: judged[index].badness)
    counts = judged[worst].counts
    return EngineReport(
        target=f"sm{backend.target}",
        builder=backend.version,
        kernels=counts.kernels,
        attention=counts.attention,
        gemms=counts.gemms,
        convolutions=counts.convolutions,
        precisions=judged[worst].precisions,
        convolution_kernels=judged[worst].convolution_kernels,
        not_low_precision=counts.not_low_precision,
        low_rank=counts.low_rank,
        notices=[
            *_unread(built.layers),
            *_several(judged, worst, names),
            *_unfused(judged[worst], worst, built.profiles),
        ],
        bytes=built.plan.nbytes,
        seconds=seconds,
        layers=built.layers,
        profiles=[
            one.counts.model_copy(update={"name": name})
            for one, name in zip(judged, names or [""] * len(judged), strict=True)
        ],
    )


def _unread(layers: list[Layer]) -> list[str]:
    found = [layer.name for layer in layers if layer.type == OTHER]
    if not found:
        return []
    return [
        f"{len(found)} entries of the builder's layer list have a form that is not known here: they are kept as layers "
        "of type 'other', counted as kernels, and no GEMM or attention is looked for in them; the first: "
        f"{found[0][:200]}"
    ]


def _several(judged: list[Judgement], worst: int, names: Sequence[str]) -> list[str]:
    if len(judged) == 1:
        return []
    kernels = ", ".join(str(one.counts.kernels) for one in judged)
    called = f"{worst}, {names[worst]}" if names else str(worst)
    return [
        f"{len(judged)} profiles: the counts are those of profile {called}, the worst of them; the builder compiles "
        f"and lists every kernel once for each (kernels by profile: {kernels})"
    ]


def _unfused(result: Judgement, index: int, profiles: list[ShapeProfile]) -> list[str]:
    notices = []
    shortest = _shortest_axis(profiles[index]) if profiles else None
    unexplained = [
        gap.module
        for gap in result.counts.not_low_precision
        if gap.kind == "attention" and NO_KERNEL in gap.reason and not gap.reason.endswith(READER)
    ]
    if unexplained and shortest is not None and shortest < _MIN_KEYS:
        notices.append(
            f"{len(unexplained)} quantized attentions are not fused in FP8, and the profile has an axis as short as "
            f"{shortest}: if that is the key sequence, raise its minimum to {_MIN_KEYS} ({', '.join(unexplained)})"
        )
    if result.short_keys:
        modules = ", ".join(module for module, _ in result.short_keys)
        fewest = min(keys for _, keys in result.short_keys)
        advice = (
            f"raise the profile's minimum to {_MIN_KEYS}" if profiles else f"export with at least {_MIN_KEYS} tokens"
        )
        notices.append(
            f"{len(result.short_keys)} quantized attentions are not fused in FP8, because their key sequence can be as "
            f"short as {fewest}: TensorRT fuses from {_MIN_KEYS} on; {advice} ({modules})"
        )
    return notices


def _shortest_axis(profile: ShapeProfile) -> int | None:
    """The smallest minimum of an axis, other than the first, that the profile leaves dynamic."""
    shapes = ((least, most) for least, _, most in profile.values())
    sizes = [low for least, most in shapes for low, high in list(zip(least, most, strict=True))[1:] if low != high]
    return min(sizes, default=None)
