"""Profiles by the names of dimensions come to the shapes that one would write by hand."""

from __future__ import annotations

from typing import Any

import pytest

from qcompile.engine.profile_dims import likely, with_shapes
from qcompile.engine.profiles import checked_profiles

INPUTS: dict[str, list[int | str]] = {
    "ids": ["batch", "n"],
    "mask": ["batch", "past + n"],
    "cache": ["batch", 2, "past"],
}
SIZES = {"batch": (1, 4, 8), "n": (1, 1, 2), "past": (0, 128, 512)}


def test_a_dimension_counts_wherever_it_stands() -> None:
    assert checked_profiles(SIZES, INPUTS) == [
        {
            "ids": ((1, 1), (4, 1), (8, 2)),
            "mask": ((1, 1), (4, 129), (8, 514)),
            "cache": ((1, 2, 0), (4, 2, 128), (8, 2, 512)),
        }
    ]
    assert likely(INPUTS) == {"batch": (1, 8, 32), "n": (32, 128, 512), "past": (32, 128, 512)}


@pytest.mark.parametrize(
    ("dims", "profile", "shapes"),
    [
        (["2*n"], {"n": (1, 2, 3)}, ((2,), (4,), (6,))),
        (["((n//2)) - 1"], {"n": (4, 5, 6)}, ((1,), (1,), (2,))),
        (["n", "m"], {"n": (1, 2, 3)}, None),
        (["n/2"], {"n": (2, 4, 6)}, None),
        (["n//m"], {"n": (2, 4, 6), "m": (0, 1, 1)}, None),
        (["__import__('os').abort()"], {"os": (1, 2, 3), "__import__": (1, 2, 3)}, None),
        (["n", "?"], {"n": (1, 2, 3)}, None),
        ([4], {"x": (4, 4, 4)}, ((4,), (4,), (4,))),
        (["n"], {"x": ((5,), (6,), (7,)), "n": (1, 2, 3)}, ((5,), (6,), (7,))),
    ],
)
def test_derived_dimensions_and_those_that_cannot_be_told(dims: list[Any], profile: Any, shapes: Any) -> None:
    assert with_shapes(profile, {"x": dims}).get("x") == shapes


def test_dimensions_without_a_name_are_guessed_by_input() -> None:
    assert likely({"x": ["?", "n"], "y": ["n"]}) == {"n": (32, 128, 512), "x": ((1, 32), (8, 128), (32, 512))}
