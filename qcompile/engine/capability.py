"""Which number formats a GPU has arithmetic for, by its compute capability: known before anything is built."""

from __future__ import annotations

from passes.capabilities import UNITS


def lacking(format: str, target: int) -> str | None:
    """Why a GPU of compute capability `target` cannot run `format`, and what to do; None if it can.

    Args:
        format: as recipes call it, or a dtype.
    """
    units = UNITS.get(format)
    if units is None or units.tensorrt is None:
        known = ", ".join(name for name, row in UNITS.items() if row.tensorrt is not None)
        return f"TensorRT is not known to have arithmetic for {format}: use one of {known}"
    if target >= units.tensorrt:
        return None
    if format == "bfloat16":
        instead = "compute in float16"
    else:
        has_fp8 = format != "fp8" and lacking("fp8", target) is None
        instead = f"quantize with the recipe {'fp8' if has_fp8 else 'int8'}"
    return (
        f"sm{target} has no {units.name} arithmetic: build for {units.targets}, or {instead} for this target "
        f"({units.name} needs sm{units.tensorrt} or newer)"
    )
