"""Private names of other libraries: a module for each library, a probe for each name.

Nothing heavy is imported before a name is asked for. What passes use stands in `passes.compat`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from passes.private import Private

__all__ = ["probes"]

_MODULES = (
    "passes.compat",
    "qcompile.compat.torch",
    "qcompile.compat.dynamo",
    "qcompile.compat.onnx",
    "qcompile.compat.transformers",
    "qcompile.compat.modelopt",
    "qcompile.compat.torch_tensorrt",
)


def probes() -> Iterator[Private]:
    """Every private name that passes and this package use, of the libraries that are installed."""
    for module in _MODULES:
        for private in importlib.import_module(module).probes():
            if private.is_installed:
                yield private
