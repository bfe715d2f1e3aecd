"""Which number formats a GPU has arithmetic for, by its compute capability: known before anything is built."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """What a format asks of a GPU: `arithmetic` by that name, from compute capability `least` on."""

    arithmetic: str
    least: int
    targets: str


# Observed with TensorRT-RTX 1.7.1: one tensor of such a type, a weight that is only dequantized included, and the
# builder says "Cannot compile for target(s) ...". INT8 builds for every target.
NEEDS = {
    "nvfp4": Need("FP4", 100, "sm120 or sm121"),
    "fp8": Need("FP8", 89, "sm89 or sm120"),
    "bfloat16": Need("bfloat16", 80, "sm86 or newer"),
}


def lacking(format: str, target: int) -> str | None:
    """Why a GPU of compute capability `target` cannot run `format`, and what to do; None if it can."""
    need = NEEDS.get(format)
    if need is None or target >= need.least:
        return None
    if format == "bfloat16":
        instead = "compute in float16"
    else:
        instead = f"quantize with the recipe {'fp8' if target >= NEEDS['fp8'].least else 'int8'}"
    return (
        f"sm{target} has no {need.arithmetic} arithmetic: build for {need.targets}, or {instead} for this target "
        f"({need.arithmetic} needs sm{need.least} or newer)"
    )
