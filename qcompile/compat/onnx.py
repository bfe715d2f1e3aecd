"""Private names of what writes ONNX files: the loggers of torch.onnx and onnxscript, which say what is no news."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from passes.private import Private

REGISTRATION = "torch.onnx._internal.exporter._registration"
"""It says that torchvision is not installed."""

LOGGERS = (
    "torch.onnx._internal.exporter._core",
    REGISTRATION,
    "onnx_ir.passes.common.initializer_deduplication",
    "onnxscript.optimizer._constant_folding",
)


def probes() -> Iterator[Private]:
    """Every private name that this module knows."""
    for name in LOGGERS:
        yield Private(name, "logger", "an export without notes on what is no news", _is_called(name))


def _is_called(name: str) -> Callable[[object], bool]:
    return lambda logger: isinstance(logger, logging.Logger) and logger.name == name
