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
    kept = ("calibrate", "sharded:make", "-o", "kept.safetensors", "--recipe", "nvfp4", "--weights", *data)
    assert main(kept) == 0 and "@0/input_1/SecondMoment/high" in load_file("kept.safetensors")
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


RECIPES = {
    "mse": qcompile.load_recipe("int8_fast", ["calibration.algorithm=mse"]),
    "percentile": qcompile.load_recipe("int8_fast", ["calibration.algorithm=percentile"]),
    "gptq": qcompile.load_recipe("nvfp4"),
    "gptq in parts": qcompile.load_recipe("nvfp4", ["calibration.memory=1000"]),
}


def bits(program: Any) -> dict[str, tuple[torch.dtype, bytes]]:
    found = {**program.state_dict, **program.constants}
    return {
        n: (t.dtype, t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for n, t in found.items()
    }


def quantized(recipe: Any, calibration: Any) -> dict[str, tuple[torch.dtype, bytes]]:
    dtype = torch.float32  # what calibrate computes in
    return bits(qcompile.quantize(PROGRAM, recipe=recipe, calibration=calibration, dtype=dtype, progress=False))


@pytest.mark.parametrize("name", RECIPES)
def test_statistics_of_shards_give_the_scales_and_codes_of_one_process(name: str, tmp_path: Path) -> None:
    options: Any = {"recipe": RECIPES[name], "calibration": batches(), "progress": False, "weights": True}
    parts = [qcompile.calibrate(PROGRAM, shard=(number, 3), **options) for number in (3, 1, 2)]
    save_file(qcompile.merge_states(parts), tmp_path / "state.safetensors")
    state = load_file(tmp_path / "state.safetensors")
    expected = quantized(RECIPES[name], batches())
    assert quantized(RECIPES[name], state) == expected
    assert quantized(RECIPES[name], qcompile.calibrate(PROGRAM, **options)) == expected
    assert expected != quantized(RECIPES[name], batches(2))


def test_statistics_are_of_one_model_and_one_recipe() -> None:
    options: Any = {"recipe": RECIPES["gptq"], "calibration": batches(), "progress": False, "weights": True}
    state = qcompile.calibrate(PROGRAM, **options)
    other = network()
    other[0].weight.data.mul_(1.5)
    with pytest.raises(CalibrationError, match="made with another model"):
        qcompile.quantize(torch.export.export(other, (torch.zeros(2, 16),)), recipe="nvfp4", calibration=state)
    with pytest.raises(CalibrationError, match="made with another recipe"):
        qcompile.quantize(PROGRAM, recipe="nvfp4_fast", calibration=state)
    lacking = {name: tensor for name, tensor in state.items() if not name.endswith("SecondMoment/high")}
    with pytest.raises(CalibrationError, match="damaged"):
        qcompile.quantize(PROGRAM, recipe="nvfp4", calibration=lacking)
    for recipe in ("int8", qcompile.load_recipe("nvfp4", ["calibration.sequential=true"])):
        with pytest.raises(CalibrationError, match="needs the data again behind each change"):
            qcompile.calibrate(PROGRAM, **options | {"recipe": recipe})
    ranges = qcompile.calibrate(PROGRAM, **options | {"weights": False})
    assert all(name.endswith("input_quantizer") for name in ranges)
