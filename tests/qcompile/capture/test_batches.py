"""Batches in pieces of the captured size: a statistic sees each sample once, or with a weight that makes up for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.graph import aten, calls
from passes.program import unlift
from qcompile.algorithms.observe import observe
from qcompile.algorithms.statistics import Statistic
from qcompile.capture import capture
from qcompile.capture.batches import flatten_batch, pieces
from qcompile.errors import CalibrationError


class Total(Statistic):
    """Sum and number of the elements, and a histogram: each needs every sample as often as it is there."""

    additive: ClassVar[bool] = True

    def __init__(self) -> None:
        self.sum = self.count = 0.0
        self.bins = torch.zeros(4, dtype=torch.float64)

    def update(self, result: Any, args: Sequence[Any], weight: float) -> None:
        self.sum += float(result.double().sum()) * weight
        self.count += result.numel() * weight
        self.bins += torch.histc(result.double(), 4, -4.0, 4.0) * weight

    def merge(self, other: Total) -> None:
        self.sum, self.count, self.bins = self.sum + other.sum, self.count + other.count, self.bins + other.bins

    def tensors(self) -> dict[str, Tensor]:
        return {"sum": torch.tensor(self.sum), "count": torch.tensor(self.count), "bins": self.bins}


class BatchSecond(nn.Module):
    """Puts the batch on the second axis, in the middle of rows, and fixes its size in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.linear(x.transpose(0, 1).reshape(length * batch, width))
        return y.reshape(length, batch, width).transpose(0, 1)


@pytest.mark.parametrize(("captured", "sizes"), [(4, (7, 3, 4, 1)), (3, (5,)), (6, (11, 5))])
def test_sums_over_pieces_are_those_of_all_samples(captured: int, sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = BatchSecond().eval()
    program = capture(model, (torch.randn(captured, 3, 4),))
    gm = unlift(program)
    batches = [torch.randn(size, 3, 4) for size in sizes]
    total = Total()
    (linear,) = calls(gm.graph, aten.linear.default)
    observe(gm, program, {linear: [total]}, batches, progress=False)
    with torch.no_grad():
        expected = model.linear(torch.cat(batches)).double()
    assert total.count == expected.numel()
    assert total.sum == pytest.approx(float(expected.sum()), rel=1e-5, abs=1e-4)
    torch.testing.assert_close(total.bins, torch.histc(expected, 4, -4.0, 4.0), atol=1e-6, rtol=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 9), st.booleans())
def test_every_sample_is_in_some_piece_and_counts_once(size: int, captured: int, evenly: bool) -> None:
    placeholder = torch.fx.Graph().placeholder("x")
    placeholder.meta["val"] = torch.empty(captured, 2)
    batch = torch.arange(size).float()[:, None].expand(size, 2)
    counted = torch.zeros(size, dtype=torch.float64)
    runs = 0
    for piece in pieces([batch], [placeholder], "the batch", evenly=evenly):
        assert piece.inputs[0].shape == (captured, 2)
        counted.index_add_(0, piece.inputs[0][:, 0].long(), torch.full((captured,), piece.weight).double())
        runs += 1
    assert bool((counted > 0).all())
    if evenly:
        torch.testing.assert_close(counted, torch.ones_like(counted))
    else:
        assert runs == -(-size // captured)


class Both(nn.Module):
    def forward(self, x: Tensor, scale: dict[str, Tensor], *, mask: Tensor) -> Tensor:
        return x * scale["a"] + mask


@pytest.mark.parametrize("sequence", [tuple, list])
def test_a_model_with_arguments_and_keywords_takes_both(sequence: type) -> None:
    args, kwargs = (torch.randn(2, 3), {"a": torch.randn(3)}), {"mask": torch.randn(2, 3)}
    program = capture(Both(), args, kwargs)
    flat = flatten_batch(sequence((sequence(args), kwargs)), program)
    expected = [args[0], args[1]["a"], kwargs["mask"]]
    assert all(torch.equal(got, want) for got, want in zip(flat, expected, strict=True))
    for batch in (args, kwargs, (args, {"other": kwargs["mask"]})):
        with pytest.raises(CalibrationError, match=r"captured as model\(Tensor, dict, mask=Tensor\); give batches as"):
            flatten_batch(batch, program)


def test_one_positional_tensor_and_keywords() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
            return x + mask

    x, mask = torch.randn(2, 3), torch.randn(2, 3)
    program = capture(Net(), (x,), {"mask": mask})
    assert [t.data_ptr() for t in flatten_batch((x, {"mask": mask}), program)] == [x.data_ptr(), mask.data_ptr()]


def test_a_dictionary_as_the_second_argument_is_one() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
            return x + more["y"]

    args = torch.randn(2, 3), {"y": torch.randn(2, 3)}
    assert len(flatten_batch(args, capture(Net(), args))) == 2
