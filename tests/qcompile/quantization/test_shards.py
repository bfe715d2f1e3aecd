"""States of shards: joined they are what a plain loop over all batches finds, and what does not belong is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompile
from qcompile.algorithms.growth import RangeLog
from qcompile.algorithms.share import Share
from qcompile.algorithms.statistics import Largest
from qcompile.cli import main
from qcompile.errors import CalibrationError

State = dict[str, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).eval()


def batches(count: int = 5) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 16) * 1.1**index for index in range(count)]


PROGRAM = torch.export.export(network(), (torch.zeros(2, 16),))


def shard(number: int, count: int, data: Any = None, program: Any = PROGRAM, recipe: str = "fp8") -> State:
    given = batches() if data is None else data
    return qcompile.calibrate(program, recipe=recipe, calibration=given, progress=False, shard=(number, count))


@pytest.fixture(scope="module")
def parts() -> list[State]:
    return [shard(number, 3) for number in (1, 2, 3)]


@torch.no_grad()
def test_three_shards_in_any_order_are_what_a_loop_finds(parts: list[State], tmp_path: Path) -> None:
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"{number}.safetensors")
    found = qcompile.merge_states([load_file(tmp_path / f"{number}.safetensors") for number in (2, 0, 1)])
    inner = network()[:2]
    assert found == {
        "0.input_quantizer": torch.stack(batches()).abs().max(),
        "2.input_quantizer": torch.stack([inner(batch) for batch in batches()]).abs().max(),
    }


class Counted(list[Tensor]):
    """Notes which of its batches were made."""

    def __init__(self, data: list[Tensor]) -> None:
        super().__init__(data)
        self.made: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.made.append(index)
        return super().__getitem__(index)


def test_batches_of_others_are_not_made_where_they_need_not_be() -> None:
    data = Counted(batches())
    assert [index for index, _ in Share(1, 3).of(data)] == data.made == [1, 4]

    def stream() -> Iterator[Tensor]:
        yield from batches()

    assert [index for index, _ in Share(1, 3).of(stream())] == [1, 4]


WRONG: dict[str, tuple[Callable[[list[State]], list[State]], str]] = {
    "missing": (lambda parts: [parts[0], parts[2]], "of 3 shards these are missing: 2"),
    "twice": (lambda parts: [*parts, parts[1]], "state 4 and state 2 are both shard 2 of 3"),
    "other count": (lambda parts: [*parts, parts[0] | {"@shard": torch.tensor([0, 2, 1])}], "shard 1 of 2, and"),
    "model": (lambda parts: [*parts[:2], parts[2] | {"@model": parts[2]["@recipe"]}], "another model than state 1"),
    "recipe": (lambda parts: [*parts[:2], parts[2] | {"@recipe": parts[2]["@model"]}], "another recipe than state 1"),
    "data": (lambda parts: [*parts[:2], parts[2] | {"@shard": torch.tensor([2, 3, 4])}], "with different data"),
    "damaged": (lambda parts: [parts[0] | {"@shard": torch.tensor([0.5])}], "damaged"),
    "whole": (lambda parts: [{"0.input_quantizer": torch.tensor(1.0)}], "state 1 is no state of a shard"),
    "nothing": (lambda parts: [], "nothing to merge"),
}


@pytest.mark.parametrize(("change", "says"), WRONG.values(), ids=WRONG)
def test_what_does_not_belong_together(
    parts: list[State], change: Callable[[list[State]], list[State]], says: str
) -> None:
    with pytest.raises(CalibrationError, match=says):
        qcompile.merge_states(change(parts))


def test_fingerprints_tell_models_and_recipes_apart(parts: list[State]) -> None:
    other = network()
    other[2].weight.data.mul_(1.01)
    changed = shard(2, 3, program=torch.export.export(other, (torch.zeros(2, 16),)))
    assert not torch.equal(changed["@model"], parts[1]["@model"])
    assert torch.equal(changed["@recipe"], parts[1]["@recipe"])
    assert not torch.equal(shard(2, 3, recipe="int8_fast")["@recipe"], parts[1]["@recipe"])


def test_a_shard_alone_a_shard_without_data_and_one_that_is_none(parts: list[State]) -> None:
    with pytest.raises(CalibrationError, match="the state of shard 2 of 3 alone: `qcompile merge`"):
        qcompile.quantize(PROGRAM, calibration=parts[1])
    with pytest.raises(CalibrationError, match="shard 6 of 6 has no batch of the calibration data"):
        shard(6, 6)
    for number, count in ((0, 3), (4, 3)):
        with pytest.raises(CalibrationError, match=r"\(2, 8\) is the second of eight"):
            shard(number, count)


def test_a_range_that_is_no_number_is_one_of_all(parts: list[State]) -> None:
    broken = parts[1] | {"0.input_quantizer": torch.tensor(float("nan"))}
    for order in ([parts[0], broken, parts[2]], [broken, parts[2], parts[0]]):
        assert bool(qcompile.merge_states(order)["0.input_quantizer"].isnan())


def test_the_growth_of_a_share_is_noted_at_the_moments_of_all() -> None:
    largest = Largest()
    log = RangeLog([largest], 12, 3)

    for index in range(1, 12, 3):
        largest.add(torch.tensor(float(index)))
        log.add(index + 1, index)
    assert {moment: samples for moment, (samples, _) in log._seen.items()} == {2: 1, 4: 1, 6: 4, 8: 7}


MODELS = """
import torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).eval(), (torch.randn(2, 16),)
def data():
    torch.manual_seed(1)
    return (torch.randn(2, 16) for _ in range(3))
"""


@pytest.mark.everyday(3)
def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sharded.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sharded", raising=False)
    data = ("--calibration", "sharded:data")
    assert main(("calibrate", "sharded:make", "-o", "whole.safetensors", *data)) == 0
    for number in (1, 2):
        argv = ("calibrate", "sharded:make", "-o", f"part-{number}.safetensors", "--shard", f"{number}/2", *data)
        assert main(argv) == 0
    assert main(("merge", "part-2.safetensors", "part-1.safetensors", "-o", "state.safetensors")) == 0
    assert Path("state.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    export = ("export", "sharded:make", "-o", "model.onnx", "--no-compare", "--calibration")
    assert main((*export, "state.safetensors")) == 0 and Path("model.onnx").is_file()
    capsys.readouterr()
    for argv, says in (
        ((*export, "part-1.safetensors"), "the state of shard 1 of 2 alone"),
        ((*export, "state.safetensors", "--samples", "2"), "is a calibrated state and no data"),
        (("merge", "part-1.safetensors", "-o", "new.safetensors"), "of 2 shards these are missing: 2"),
        (("merge", "none.safetensors", "-o", "new.safetensors"), "there is no state none.safetensors"),
        (("calibrate", "sharded:make", "-o", "new.safetensors", "--shard", "3/2", *data), "write it as 2/8"),
        (("calibrate", "sharded:make", "-o", "new.safetensors"), "say what to calibrate with"),
        (("calibrate", "sharded:make", "-o", "new.pt", *data), "--output FILE.safetensors"),
    ):
        assert main(argv) == 2
        assert says in capsys.readouterr().err
        assert not Path("new.safetensors").exists()
