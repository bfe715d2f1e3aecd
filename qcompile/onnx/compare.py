"""Compare two executions tensor by tensor: how far apart, where worst, and how many codes differ."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from qcompile.onnx.execute import Execution, Segment, run_onnx_intermediates, run_onnx_layers
from qcompile.onnx.view import Array
from qcompile.report.comparison import Comparison, Difference

__all__ = [
    "Comparison",
    "Difference",
    "Execution",
    "Segment",
    "compare",
    "run_onnx_intermediates",
    "run_onnx_layers",
]

# Types whose elements are codes of a quantized tensor: compared bit by bit, since one step between them can be large.
_CODES = {
    np.dtype(getattr(ml_dtypes, name))
    for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float8_e8m0fnu", "int4", "uint4")
}


def compare(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> Comparison:
    """Compare each tensor of `reference` with the one of that name in `candidate`; one that is missing is a problem."""
    return Comparison(tuple(_difference(name, value, candidate.get(name)) for name, value in reference.items()))


def _difference(name: str, reference: Array, candidate: Array | None) -> Difference:
    reference = np.asarray(reference)
    problem = _mismatch(reference, None if candidate is None else np.asarray(candidate))
    if problem or candidate is None:
        return Difference(name, reference.size, math.inf, math.inf, math.nan, problem=problem)
    candidate = np.asarray(candidate)
    unequal = _unequal_codes(reference, candidate) if _is_code(reference) else None
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    finite_a, finite_b = np.isfinite(a), np.isfinite(b)
    both = finite_a & finite_b
    same_nonfinite = ~finite_a & ((a == b) | (np.isnan(a) & np.isnan(b)))
    counts = (int((~finite_a).sum()), int((~finite_b).sum()), int((~both & ~same_nonfinite).sum()))
    return Difference(name, reference.size, *_distances(a[both], b[both]), unequal, *counts)


def _distances(a: Array, b: Array) -> tuple[float, float, float]:
    """max_abs, relative_l2, cosine. Two zeros are equal and parallel; a zero reference is infinitely far away."""
    error, norm_a, norm_b = np.abs(a - b), float(np.linalg.norm(a)), float(np.linalg.norm(b))
    distance = float(np.linalg.norm(error))
    relative = distance / norm_a if norm_a else (math.inf if distance else 0.0)
    if norm_a and norm_b:
        cosine = float(np.clip((a / norm_a) @ (b / norm_b), -1.0, 1.0))
    else:
        cosine = 1.0 if norm_a == norm_b else 0.0
    return float(error.max(initial=0.0)), relative, cosine


def _is_code(array: Array) -> bool:
    return array.dtype in _CODES or array.dtype.kind in "iub"


def _mismatch(reference: Array, candidate: Array | None) -> str | None:
    if candidate is None:
        return "not in the candidate"
    if reference.shape != candidate.shape:
        return f"shape {list(candidate.shape)}, the reference has {list(reference.shape)}"
    if (_is_code(reference) or _is_code(candidate)) and reference.dtype != candidate.dtype:
        return f"dtype {candidate.dtype}, the reference has {reference.dtype}: codes of two types do not compare"
    return None


def _unequal_codes(reference: Array, candidate: Array) -> float:
    if not reference.size:
        return 0.0
    unsigned = np.dtype(f"u{reference.dtype.itemsize}")
    a, b = (np.ascontiguousarray(x).view(unsigned) for x in (reference, candidate))
    return float(np.mean(a != b))
