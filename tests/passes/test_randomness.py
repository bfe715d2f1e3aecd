"""What draws random numbers, and what could and was told not to."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch

from passes.graph import aten
from passes.randomness import draws
from passes.testing import blank


@pytest.mark.parametrize(
    ("target", "arguments", "options", "expected"),
    [
        (aten.dropout.default, (0.5, True), {}, True),
        (aten.dropout.default, (0.5, False), {}, False),
        (aten.dropout.default, (0.0, True), {}, False),
        (aten.native_dropout.default, (0.5, None), {}, True),
        (aten.native_dropout.default, (0.5, True), {}, True),
        (aten.native_dropout.default, (0.5, False), {}, False),
        (aten.rrelu.default, (0.1, 0.3, True), {}, True),
        (aten.rrelu.default, (), {"training": False}, False),
        (aten.rrelu.default, (), {}, False),  # what the schema says
        (aten.bernoulli.p, (0.5,), {}, True),
        (aten.bernoulli.p, (0.0,), {}, False),
        (aten.rand_like.default, (), {}, True),
        (aten.relu.default, (), {}, False),
        (operator.neg, (), {}, False),
    ],
)
def test_what_draws(target: Any, arguments: tuple[Any, ...], options: dict[str, Any], expected: bool) -> None:
    _, emit, (x,) = blank(torch.randn(3))
    assert draws(emit(target, x, *arguments, **options)) is expected


@pytest.mark.parametrize(("share", "expected"), [(0.1, True), (0.0, False)])
def test_attention_draws_only_with_dropout(share: float, expected: bool) -> None:
    _, emit, (x,) = blank(torch.randn(1, 2, 3, 4))
    attention = aten.scaled_dot_product_attention.default
    assert draws(emit(attention, x, x, x, None, share)) is expected
    assert draws(emit(attention, x, x, x, dropout_p=share)) is expected
    assert not draws(x)
