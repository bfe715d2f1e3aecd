"""Finds a TensorRT that can build for a target: `tensorrt` for the GPU at hand, else `tensorrt_rtx` ahead of time."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

import torch

from qcompile.errors import EngineError


@dataclass(frozen=True)
class Backend:
    """A builder package. `capability` is set when it has to be told the target (ahead of time, no GPU needed)."""

    trt: Any
    package: str
    target: int
    capability: Any | None

    @property
    def version(self) -> str:
        return f"{self.package} {self.trt.__version__}"


def parse_target(target: str) -> int:
    """`sm89`, `SM_89` or `8.9` -> 89. Raises EngineError for anything else."""
    if match := re.fullmatch(r"(?:sm_?)?(\d{2,3})", target.strip(), re.IGNORECASE):
        return int(match[1])
    if match := re.fullmatch(r"(\d{1,2})\.(\d)", target.strip()):
        return int(match[1] + match[2])
    raise EngineError(f"target {target!r} is not a compute capability: write it like sm89, sm120 or 8.9")


def find_backend(target: str | None, package: str | None = None) -> Backend:
    """Choose the builder for a target; None means the GPU of this machine. `package` leaves one to choose from.

    Raises:
        EngineError: no builder is installed, or none of those installed builds for the target.
    """
    here = _gpu()
    wanted = parse_target(target) if target is not None else here
    if wanted is None:
        raise EngineError("no target was given and this machine has no usable GPU: name one, such as target='sm89'")
    if package != "tensorrt_rtx" and wanted == here and (trt := _import("tensorrt")) is not None:
        return Backend(trt, "tensorrt", wanted, None)
    rtx = _import("tensorrt_rtx") if package != "tensorrt" else None
    if rtx is None:
        raise EngineError(_nothing_installed(wanted, here))
    accepted = _accepted(rtx)
    if wanted not in accepted:
        names = ", ".join(f"sm{n}" for n in sorted(accepted))
        raise EngineError(f"unknown target sm{wanted}: tensorrt_rtx {rtx.__version__} builds for {names}")
    return Backend(rtx, "tensorrt_rtx", wanted, accepted[wanted])


def built_for(trt: Any, package: str) -> list[int]:
    """Compute capabilities of the GPUs that a builder can build for here."""
    if package == "tensorrt_rtx":
        return sorted(_accepted(trt))
    return [here] if (here := _gpu()) is not None else []


def _accepted(rtx: Any) -> dict[int, Any]:
    """Compute capability -> what the builder calls it."""
    return {int(n[2:]): c for n, c in rtx.ComputeCapability.__members__.items() if re.fullmatch(r"SM\d+", n)}


def _nothing_installed(wanted: int, here: int | None) -> str:
    if _import("tensorrt") is None:
        return (
            "building an engine needs TensorRT, of which RTX works without a GPU: pip install 'qcompile[tensorrt-rtx]'"
        )
    gpu = f"this machine's GPU is sm{here}" if here is not None else "this machine has no usable GPU"
    return (
        f"tensorrt builds only for the GPU at hand, and {gpu}: to build for sm{wanted} ahead of time, "
        "pip install 'qcompile[tensorrt-rtx]'"
    )


def _import(package: str) -> Any | None:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        return None


def _gpu() -> int | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor
