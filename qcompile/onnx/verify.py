"""The structural verifier: what must hold for every ONNX file before it is put in place.

It reads no weight larger than 1 kB: the checks look at a skeleton of the model, its small constants, and file sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import onnx

from qcompile.errors import VerificationError
from qcompile.onnx.checks.base import CheckFunction
from qcompile.onnx.checks.dependence import dependence, input_dependence
from qcompile.onnx.checks.forms import block_weights, casts, float_weights, gemm_types, tensorrt
from qcompile.onnx.checks.opsets import opsets
from qcompile.onnx.checks.structure import nothing_opaque, payloads, shapes, well_formed
from qcompile.onnx.checks.values import global_scales, scales, zero_points
from qcompile.onnx.view import ModelView
from qcompile.report.check import Check

__all__ = ["CHECKS", "Check", "onnx_dependence", "require", "verify_onnx"]

CHECKS: tuple[tuple[str, CheckFunction], ...] = (
    ("payloads", payloads),
    ("opsets", opsets),
    ("checker", well_formed),
    ("nothing_opaque", nothing_opaque),
    ("shapes", shapes),
    ("input_dependence", input_dependence),
    ("scales", scales),
    ("zero_points", zero_points),
    ("global_scales", global_scales),
    ("float_weights", float_weights),
    ("casts", casts),
    ("gemm_types", gemm_types),
    ("block_weights", block_weights),
    ("tensorrt", tensorrt),
)
# What comes after a gate relies on everything before it; on a file that is not ONNX it would only mislead.
_GATES = {"payloads", "checker"}
_SHOWN = 5


def verify_onnx(
    source: str | os.PathLike[str] | onnx.ModelProto,
    reference_dependence: Mapping[str, set[str]] | None = None,
) -> list[Check]:
    """Run `CHECKS` on an ONNX file, or on a model that holds its own weights.

    `reference_dependence`: graph output -> inputs that it depends on in the source program, by value (not by shape).
    Where the file is not valid ONNX the list ends with that finding. Raises VerificationError if the
    file cannot be read, is no ONNX file at all, or is unsound (`qcompile.onnxfile.structure`).
    """
    view = ModelView(source, reference_dependence)
    results: list[Check] = []
    for name, check in CHECKS:
        problems, seen = check(view)
        results.append(Check(name, not problems, "; ".join(_shortened(problems)) or seen))
        if name in _GATES and not all(result.passed for result in results):
            break
    return results


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - _SHOWN
    return problems if more <= 0 else [*problems[:_SHOWN], f"and {more} more"]


def require(checks: Iterable[Check]) -> None:
    """Raises VerificationError that names every check that failed."""
    failed = [check for check in checks if not check.passed]
    if failed:
        lines = "".join(f"\n  {check.name}: {check.detail}" for check in failed)
        raise VerificationError(f"the ONNX file fails {len(failed)} check{'s'[: len(failed) > 1]}:{lines}")


def onnx_dependence(source: str | os.PathLike[str] | onnx.ModelProto) -> dict[str, set[str]]:
    """Graph output -> graph inputs whose values it depends on: `reference_dependence` from an ONNX file."""
    return dependence(ModelView(source))
