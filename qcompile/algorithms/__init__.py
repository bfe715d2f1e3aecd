"""Calibration algorithms: how scales, and codes of weights, are chosen. One file each, and one line here.

Another package brings its own by an entry point, `percentile = "package:Percentile"` in `qcompile.algorithms`.
"""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.algorithms.base import Algorithm

__all__ = ["ALGORITHMS", "algorithm_called", "find_installed"]

ALGORITHMS: dict[str, str | type[Algorithm[Any]]] = {
    "max": "qcompile.algorithms.max.Max",
    "mse": "qcompile.algorithms.mse.Mse",
    "hessian_mse": "qcompile.algorithms.hessian_mse.HessianMse",
    "gptq": "qcompile.algorithms.gptq.Gptq",
    "percentile": "qcompile.algorithms.percentile.Percentile",
    "smoothquant": "qcompile.algorithms.smoothquant.SmoothQuant",
    "awq": "qcompile.algorithms.awq.Awq",
    "svdquant": "qcompile.algorithms.svdquant.Svdquant",
}
"""What a recipe calls an algorithm -> its class, or the place of it: they need torch, and reading a recipe does not."""


@cache
def find_installed() -> None:
    """Add to `ALGORITHMS` what installed packages bring. Nobody pays for looking who names none but ours."""
    for point in entry_points(group="qcompile.algorithms"):
        ALGORITHMS.setdefault(point.name, point.value.replace(":", "."))


def algorithm_called(name: str) -> type[Algorithm[Any]]:
    """The class of an algorithm. Raises KeyError for a name that is not among `ALGORITHMS`."""
    found = ALGORITHMS[name]
    if isinstance(found, str):
        module, _, leaf = found.rpartition(".")
        loaded: type[Algorithm[Any]] = getattr(importlib.import_module(module), leaf)
        return loaded
    return found
