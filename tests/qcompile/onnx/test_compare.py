"""Comparison of two executions: the numbers, and what has no number."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.onnx.compare import compare

F8 = ml_dtypes.float8_e4m3fn


def one(reference: np.ndarray, candidate: np.ndarray):  # type: ignore[no-untyped-def]
    return compare({"t": reference}, {"t": candidate})["t"]


def test_numbers() -> None:
    d = one(np.array([3.0, 4.0], np.float32), np.array([3.0, 4.5], np.float16))
    assert (d.max_abs, d.relative_l2, d.unequal) == (0.5, 0.1, None)
    assert d.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=20))
def test_equal_tensors_are_at_no_distance(values: list[float]) -> None:
    d = one(np.array(values), np.array(values))
    assert d.max_abs == d.relative_l2 == 0
    assert d.cosine == pytest.approx(1.0)


def test_codes_are_compared_bit_by_bit() -> None:
    codes = np.arange(256, dtype=np.uint8).view(F8)  # NaN twice, both zeros
    assert one(codes, codes.copy()).unequal == 0
    other = codes.copy()
    other.view(np.uint8)[[0, 7]] ^= 0x80  # +0 to -0 as well: another code, the same value
    d = one(codes, other)
    assert d.unequal == 2 / 256
    assert d.nonfinite_unequal == 0
    assert d.nonfinite_reference == 2


def test_codes_of_integers_and_of_strided_arrays() -> None:
    a = np.arange(16, dtype=np.int8).reshape(4, 4)
    assert one(a.T, a).unequal == 12 / 16


def test_zero_tensors() -> None:
    zero, some = np.zeros(3), np.ones(3)
    assert (one(zero, zero).relative_l2, one(zero, zero).cosine) == (0.0, 1.0)
    assert (one(zero, some).relative_l2, one(zero, some).cosine) == (math.inf, 0.0)
    assert one(np.zeros((0, 3)), np.zeros((0, 3))).max_abs == 0.0


def test_nonfinite_elements_are_counted_and_left_out() -> None:
    reference = np.array([1.0, np.nan, np.inf, -np.inf, 2.0])
    d = one(reference, np.array([1.0, np.nan, np.inf, np.inf, np.nan]))
    assert (d.nonfinite_reference, d.nonfinite_candidate, d.nonfinite_unequal) == (3, 4, 2)
    assert (d.max_abs, d.badness) == (0.0, math.inf)
    assert one(reference, reference).badness == 0.0


@pytest.mark.parametrize(
    ("candidate", "problem"),
    [
        ({}, "not in the candidate"),
        ({"t": np.zeros((3, 2), F8)}, r"shape [3, 2], the reference has [2, 3]"),
        ({"t": np.zeros((2, 3), np.uint8)}, "codes of two types"),
    ],
)
def test_what_cannot_be_compared_says_so(candidate: dict[str, np.ndarray], problem: str) -> None:
    d = compare({"t": np.zeros((2, 3), F8)}, candidate)["t"]
    assert d.problem is not None
    assert problem in d.problem
    assert d.badness == math.inf


def test_worst_comes_first_and_json_is_strict() -> None:
    x = np.ones(4)
    comparison = compare({"a": x, "b": x, "c": x, "d": x}, {"a": x, "b": x * 1.1, "c": x * np.nan, "d": x * 1.5})
    assert [d.name for d in comparison.worst(3)] == ["c", "d", "b"]
    missing = compare({"a": x}, {}).to_json()
    text = json.dumps([*comparison.to_json(), *missing], allow_nan=False)
    assert json.loads(text)[-1]["max_abs"] == "inf"
