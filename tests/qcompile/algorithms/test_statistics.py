"""Statistics that merge: what two machines saw is what one would have seen, in any order, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.algorithms.second_moment import SecondMoment
from qcompile.algorithms.statistics import (
    FullyMasked,
    Histogram,
    Largest,
    LargestBeforeSoftmax,
    LargestScore,
    Statistic,
)

X = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 5, 7)[:, None, None]
KINDS: dict[str, Callable[[], Any]] = {
    "largest": Largest,
    "before softmax": lambda: LargestBeforeSoftmax(-1, 1e4),
    "score": lambda: LargestScore(0.25, 1.0),
    "masked": FullyMasked,
    "histogram": Histogram,
    "second moment": SecondMoment,
    "its blocks": lambda: SecondMoment(2),
}


def seen(make: Callable[[], Any], batches: torch.Tensor) -> Any:
    statistic: Statistic = make()
    for x in batches:
        statistic.update(x, (x[None], x[None]), 1.0)
    return statistic


def same(a: Statistic, b: Statistic) -> bool:
    one, other = a.tensors(), b.tensors()
    return one.keys() == other.keys() and all(torch.equal(one[n].nan_to_num(-1), other[n].nan_to_num(-1)) for n in one)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("special", [0.0, float("nan"), float("-inf"), 3e38])
def test_a_merge_is_an_update_of_both(make: Callable[[], Any], special: float) -> None:
    batches = X.clone()
    batches[2, 0] = special
    whole = seen(make, batches)
    for cut in (0, 1, 4, 7):
        first, second = seen(make, batches[:cut]), seen(make, batches[cut:])
        first.merge(second)
        assert same(first, whole), cut
        assert same(seen(make, batches.flip(0)), whole)
    assert isinstance(whole, FullyMasked) or not same(whole, make())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=60), st.randoms())
def test_a_histogram_counts_each_number_once_whatever_comes_first(numbers: list[float], random: Any) -> None:
    shuffled = random.sample(numbers, len(numbers))
    one, other = seen(Histogram, torch.tensor(numbers)[:, None]), seen(Histogram, torch.tensor(shuffled)[:, None])
    assert same(one, other) and float(one.counts.sum()) == len(numbers)
    filled = one.counts.nonzero().flatten()
    low, high = float(filled[0]) * one.width, float(filled[-1] + 1) * one.width
    sizes = torch.tensor(numbers).abs().double()
    assert low <= float(sizes.min()) and float(sizes.max()) < high


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("special", [0.0, float("nan")])
def test_what_is_loaded_goes_on_as_what_was_saved(make: Callable[[], Any], special: float) -> None:
    batches = X.clone()
    batches[2, 0] = special
    whole, known = seen(make, batches), make()
    first = seen(make, batches[:4])
    before = {name: tensor.clone() for name, tensor in first.tensors().items()}
    known.load(first.tensors())
    assert same(known, first)
    known.merge(seen(make, batches[4:]))
    assert same(known, whole)
    known.load(before)
    assert all(torch.equal(before[n].nan_to_num(-1), known.tensors()[n].nan_to_num(-1)) for n in before)


def test_samples_that_come_n_times_are_whole_numbers() -> None:
    repeated = Histogram()
    repeated.update(torch.ones(49), (), 1 / 49)
    assert float(repeated.counts.sum()) == 1


def test_pieces_of_a_batch_count_by_their_weight() -> None:
    x = torch.rand(8, 4)
    whole, thirds = seen(Histogram, x[None]), Histogram()
    for _ in range(3):
        thirds.update(x, (), 1 / 3)
    assert same(whole, thirds)


@pytest.mark.parametrize("width", [None, 2, 5])
def test_a_second_moment_is_that_of_all_tokens(width: int | None) -> None:
    flat = X.flatten(0, 1).double().numpy()
    moment = seen(lambda: SecondMoment(width, double=True), X)
    found = moment.blocks(width or 5, 5)[0].numpy()
    whole = np.zeros((6, 6))
    whole[:5, :5] = flat.T @ flat
    size = width or 5
    for index, block in enumerate(found):
        part = slice(index * size, index * size + size)
        np.testing.assert_allclose(block, whole[part, part][:size, :size], rtol=0, atol=whole.max() * 2**-31)
    assert float(moment.tokens) == 21
