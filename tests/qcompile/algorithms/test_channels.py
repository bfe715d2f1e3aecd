"""What is kept of channels, against plain loops, in any order and on any number of machines."""

from __future__ import annotations

import torch

from qcompile.algorithms.channels import Channels


def seen(*batches: torch.Tensor, size: int = 8) -> Channels:
    found = Channels(size)
    for batch in batches:
        found.update(batch, (), 1.0)
    return found


def same(a: Channels, b: Channels) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


DATA = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 8.0, 0.0, 0.25, 1.0])


def test_sizes_are_those_of_all_rows_and_the_sample_is_held_out() -> None:
    found = seen(DATA.reshape(2, 100, 5))
    assert found.sizes.largest.tolist() == [max(abs(float(v)) for v in column) for column in DATA.T]
    torch.testing.assert_close(found.sizes.mean, DATA.abs().mean(0))
    held = found.held_out
    assert len(held) == 8 and all(any(torch.equal(row, other) for other in DATA) for row in held)
    rest = [row for row in DATA if not any(torch.equal(row, other) for other in seen(DATA, size=200).held_out)]
    assert 10 <= len(rest) <= 45  # about an eighth
    assert torch.equal(found.fitting.largest, torch.stack(rest).abs().amax(0))


def test_order_parts_and_repeats_do_not_matter() -> None:
    whole = seen(DATA)
    turned = seen(DATA.flip(0)[:7], DATA.flip(0)[7:])
    merged = seen(DATA[:13])
    merged.merge(seen(DATA[13:]))
    for found in (turned, merged):
        assert torch.equal(found.rows, whole.rows) and torch.equal(found.sizes.largest, whole.sizes.largest)
        torch.testing.assert_close(found.sizes.mean, whole.sizes.mean)
    twice = Channels(8)
    for _ in range(2):  # as pieces of batches come, each of which has every sample twice
        twice.update(DATA, (), 0.5)
    torch.testing.assert_close(twice.sizes.mean, whole.sizes.mean, rtol=1e-9, atol=0)
    assert twice.count == whole.count and torch.equal(twice.rows, whole.rows)
    empty = Channels(8)
    empty.merge(whole)
    empty.merge(Channels(8))
    assert same(empty, whole)


def test_batches_that_several_saw_are_those_of_one_bit_for_bit() -> None:
    batches = (DATA * torch.logspace(-6, 6, 200)[:, None]).split(7)
    whole, other, loaded = seen(*batches), seen(*batches[1::2]), Channels(8)
    other.merge(seen(*batches[::2]))
    loaded.load(other.tensors())
    assert same(other, whole) and same(loaded, whole)


def test_one_row_is_fitted_and_judged_on() -> None:
    for row in DATA[:4]:
        found = seen(row[None])
        assert torch.equal(found.held_out, row[None]) and torch.equal(found.fitting.largest, row.abs())
    nothing = seen(DATA[:0])
    assert not nothing.count and not len(nothing.keys)
