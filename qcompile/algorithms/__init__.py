"""Calibration algorithms: how scales, and codes of weights, are chosen. One file each, and one line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.algorithms.base import Algorithm

__all__ = ["ALGORITHMS", "algorithm_called"]

ALGORITHMS: dict[str, str | type[Algorithm[Any]]] = {
    "max": "qcompile.algorithms.max.Max",
    "mse": "qcompile.algorithms.mse.Mse",
}
"""What a recipe calls an algorithm -> its class, or the place of it: they need torch, and reading a recipe does not."""


def algorithm_called(name: str) -> type[Algorithm[Any]]:
    """The class of an algorithm. Raises KeyError for a name that is not among `ALGORITHMS`."""
    found = ALGORITHMS[name]
    if isinstance(found, str):
        module, _, leaf = found.rpartition(".")
        loaded: type[Algorithm[Any]] = getattr(importlib.import_module(module), leaf)
        return loaded
    return found
