"""How ranges grew over the samples: beside a plain loop over what a hook sees, and what reports make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.cli import main
from qcompile.errors import CalibrationError
from qcompile.report.program import ProgramReport
from qcompile.report.ranges import RangeGrowth, RangeStep

GREW = "ranges grew by more than 5% in the last 4 of 8 samples of calibration"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).eval()


def growing(count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 8) * 1.1**index for index in range(count)]


def growth(batches: Iterable[Tensor], recipe: str | qcompile.Recipe = "fp8") -> tuple[RangeGrowth | None, list[str]]:
    program = qcompile.quantize(
        model(), (torch.randn(2, 8),), recipe=recipe, calibration=batches, dtype=torch.float32, progress=False
    )
    report = ProgramReport.of(program)
    return report.ranges, [notice for notice in report.notices if "ranges" in notice]


def plainly(batches: list[Tensor], after: list[int]) -> list[tuple[int, int, float]]:
    """(samples, ranges that the rest made larger by more than 5 %, the most) after some numbers of batches."""
    network = model()

    @torch.no_grad()
    def largest(some: list[Tensor]) -> list[float]:
        inner = [float(network[:2](batch).abs().max()) for batch in some]  # type: ignore[index]
        return [max(float(batch.abs().max()) for batch in some), max(inner)]

    found, final = [], largest(batches)
    for count in after:
        factors = [b / a for a, b in zip(largest(batches[:count]), final, strict=True)]
        found.append((2 * count, sum(factor > 1.05 for factor in factors), max(factors)))
    return found


@pytest.mark.parametrize(("kind", "after"), [(list, [1, 2, 4, 6, 8]), (iter, [1, 2, 4, 8])], ids=["list", "iterator"])
def test_it_is_what_a_loop_finds(kind: Callable[[Any], Any], after: list[int]) -> None:
    batches = growing(11)
    found, notices = growth(kind(batches))
    assert found is not None and (found.ranges, found.samples) == (2, 22)
    expected = plainly(batches, after)
    assert [(step.samples, step.larger) for step in found.steps] == [(samples, more) for samples, more, _ in expected]
    torch.testing.assert_close([step.factor for step in found.steps], [most for *_, most in expected])
    assert {step.quantizer for step in found.steps} <= {"0.input_quantizer", "2.input_quantizer"}
    assert notices == [str(found)] and "more data would help" in notices[0]


def test_enough_data_is_no_notice() -> None:
    batches = growing(4)
    found, notices = growth([batches[3], *batches[:3]])
    assert not notices and str(found) == "the last 4 of 8 samples of calibration changed no range by more than 1%"
    assert growth(batches[:1]) == (None, []), "one batch says nothing of others"


class Stream(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(growing(4))


def test_a_loader_of_a_stream_has_no_length() -> None:
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    found, _ = growth(loader)
    assert found is not None and [step.samples for step in found.steps] == [2, 4]


def test_algorithms_that_keep_more_of_a_range_tell_the_same() -> None:
    assert growth(growing(4), qcompile.load_recipe("fp8", ["calibration.algorithm=mse"])) == growth(growing(4))


def test_what_was_not_reached_before_counts_as_growth() -> None:
    zeros = torch.zeros(2, 8)
    found, notices = growth([zeros, zeros + 1])
    assert found is not None and found.steps[0] == RangeStep(2, 2, found.steps[0].factor, "2.input_quantizer")
    assert notices


@pytest.mark.parametrize(
    ("larger", "factor", "expected"),
    [
        (3, 1.5, f"3 of 9 {GREW}, most of all q (1.5 x): more data would help"),
        (1, 1.0, f"1 of 9 {GREW}: more data would help"),
        (0, 1.04, "the last 4 of 8 samples of calibration changed no range by more than 5%"),
        (0, 1.0, "the last 4 of 8 samples of calibration changed no range by more than 1%"),
    ],
)
def test_sentences(larger: int, factor: float, expected: str) -> None:
    steps = (RangeStep(1, 9, 9.0, "other"), RangeStep(4, larger, factor, "q"), RangeStep(7, 0, 1.0, "q"))
    assert str(RangeGrowth(9, 8, steps)) == expected


def test_it_is_kept_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = growing(4)
    program = qcompile.quantize(model(), (batches[0],), recipe="fp8", calibration=batches, progress=False)
    torch.export.save(program, tmp_path / "m.pt2")
    again = torch.export.load(tmp_path / "m.pt2")
    found = ProgramReport.of(again).ranges
    assert found is not None and found == ProgramReport.of(program).ranges
    older = ProgramReport.of(again).data()
    del older["ranges"]
    assert ProgramReport.from_data(older).ranges is None
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "m.pt2")]) == 0
    assert f"Ranges: {found}" in capsys.readouterr().out


def test_a_nan_names_its_batch() -> None:
    batches = growing(4)
    batches[2][1, 3] = torch.nan
    with pytest.raises(CalibrationError, match="nan in input_1, first in calibration batch 2, whose input_1 holds NaN"):
        growth(batches)
    with pytest.raises(CalibrationError, match=r"first in calibration batch 1$"):
        growth([batches[0], batches[1] * torch.inf])
