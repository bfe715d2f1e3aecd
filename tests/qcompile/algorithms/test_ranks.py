"""Calibration over ranks: with any number of them every rank has, bit for bit, what one process has.

Everyday ranks are threads that exchange what gloo would carry; slow tests have processes and gloo, and torchrun.
"""

from __future__ import annotations

import datetime
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.algorithms import ranks as over_ranks
from qcompile.algorithms.ranks import Ranks, ranks
from qcompile.algorithms.share import WHOLE, Share
from qcompile.algorithms.statistics import Largest
from qcompile.capture.batch_notices import BatchLog
from qcompile.errors import CalibrationError, JoinedError, QCompileError
from qcompile.quantization import solve
from qcompile.report.program import ProgramReport

Result = tuple[dict[str, Tensor], str]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).eval()


def batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 16, generator=generator) * 1.1**index for index in range(count)]


def recipes() -> dict[str, Any]:
    return {
        "max": "fp8",
        "mse": qcompile.load_recipe("int8_fast", ["calibration.algorithm=mse"]),
        "gptq": "nvfp4",
        "sequential": qcompile.load_recipe("nvfp4", ["calibration.sequential=true"]),
        "smoothquant": "int8",
    }


def quantized(recipe: Any, model: Any = None, data: Any = None) -> Result:
    program = qcompile.quantize(model or PROGRAM, recipe=recipe, calibration=data or batches(), progress=False)
    return {**program.state_dict, **program.constants}, ProgramReport.of(program).to_json()


PROGRAM = torch.export.export(network(), (torch.zeros(2, 16),))


def same(one: Result, other: Result) -> bool:
    bits = ({name: (tensor.dtype, bytes_of(tensor)) for name, tensor in found[0].items()} for found in (one, other))
    return next(bits) == next(bits) and one[1] == other[1]


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Thread(Ranks):
    """A rank that is a thread, and what it exchanges with the others."""

    table: list[Any] = None  # type: ignore[assignment]
    barrier: threading.Barrier = None  # type: ignore[assignment]

    def _gathered(self, own: Any) -> list[Any]:
        self.table[self.index] = pickle.dumps(own)  # which no other thread changes
        self.barrier.wait(60)
        found = [pickle.loads(each) for each in self.table]
        self.barrier.wait(60)
        return found

    def _send(self, data: Tensor, rank: int) -> None:
        data.copy_(self._gathered(data.clone())[rank])


def on_threads(count: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[int], Any]) -> list[Any]:
    """What `work` gives on each rank, or the error that it raises."""
    own = threading.local()
    monkeypatch.setattr(over_ranks, "_SMALL", 8)  # so that tensors travel alone, too
    monkeypatch.setattr(solve, "ranks", lambda: getattr(own, "share", WHOLE))
    table, barrier = [None] * count, threading.Barrier(count)

    def run(rank: int) -> Any:
        own.share = Thread(rank, count, table, barrier)
        try:
            return work(rank)
        except QCompileError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.mark.parametrize("name", ["max", "gptq"])
def test_every_rank_has_the_program_of_one_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes()[name]
    one = quantized(recipe, PROGRAM)
    for found in on_threads(3, monkeypatch, lambda rank: quantized(recipe, PROGRAM)):
        assert same(found, one)


def test_what_goes_wrong_is_one_error_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    program, other = PROGRAM, network()
    other[0].bias.data.mul_(1.5)
    others = torch.export.export(other, (torch.zeros(2, 16),))
    wrong = [*batches(3), torch.zeros(3, 5)]
    cases: list[tuple[Callable[[int], Any], str]] = [
        (lambda rank: quantized("fp8", others if rank else program), "were given different models"),
        (lambda rank: quantized("int8_fast" if rank else "fp8", program), "were given different recipes"),
        (lambda rank: quantized("fp8", program, batches(4 + rank)), "were given different numbers of batches"),
        (lambda rank: quantized("fp8", program, batches(1)), "rank 1: this process has no batch"),
        (lambda rank: quantized("fp8", program, iter(batches(1))), "rank 1: this process has no batch"),
        (lambda rank: quantized("fp8", program, wrong), "rank 1: calibration batch 3"),
    ]
    for work, says in cases:
        for found in on_threads(2, monkeypatch, work):
            assert isinstance(found, JoinedError) and says in str(found), found


def test_a_nan_is_told_with_the_batch_of_all_that_it_came_first_in(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(12)
    data[10][0, 0] = data[9][0, 1] = float("nan")
    for found in on_threads(2, monkeypatch, lambda rank: quantized("fp8", PROGRAM, data)):
        assert isinstance(found, CalibrationError) and "first in calibration batch 9" in str(found)


def test_an_error_that_nobody_can_be_told_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(over_ranks.dist, "all_gather_object", gone)
    monkeypatch.setattr(over_ranks, "_group", lambda world: world)
    alone = Ranks(0, 2)
    alone.failed(ValueError("a fault"))  # observe raises it then
    with pytest.raises(JoinedError, match=r"another process of the group has ended.*connection closed by peer"):
        alone.join([], BatchLog(PROGRAM, []), None)


def test_a_statistic_without_a_way_back_says_so() -> None:
    class Own(Largest):
        load = qcompile.algorithms.statistics.Statistic.load  # type: ignore[attr-defined]

    with pytest.raises(QCompileError, match="Own has no `load`"):
        Own().load({})


def test_alone_in_a_group_or_without_one_it_is_all() -> None:
    assert ranks() is WHOLE and ranks() == Share(0, 1)


def process(rank: int, count: int, folder: str, wrong: str) -> None:
    """One of several processes with gloo."""
    from torch import distributed as dist

    torch.set_num_threads(1)
    over_ranks._SMALL = 4096
    timeout = datetime.timedelta(seconds=5 if wrong else 300)
    store = f"file://{folder}/store{count}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timeout)
    if not wrong:
        torch.save([quantized(recipe) for recipe in recipes().values()], f"{folder}/{count}.{rank}")
        dist.destroy_process_group()
        return
    if rank == 1 and wrong == "dies":
        os._exit(0)
    if rank == 1:  # does something else
        threading.Event().wait(15)
        os._exit(0)
    try:
        quantized("fp8")
    except JoinedError as error:
        Path(folder, f"told.{rank}").write_text(str(error))
    os._exit(0)


@pytest.mark.slow
def test_one_two_and_three_processes_have_the_same_programs(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = [quantized(recipe) for recipe in recipes().values()]
    finally:
        torch.set_num_threads(threads)
    for count in (2, 3):
        torch.multiprocessing.spawn(process, (count, str(tmp_path), ""), nprocs=count)
        for rank in range(count):
            found = torch.load(tmp_path / f"{count}.{rank}", weights_only=True)
            for name, one, other in zip(recipes(), expected, found, strict=True):
                assert same(one, other), (name, count, rank)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["dies", "does not come"])
def test_a_rank_that_does_not_calibrate_is_an_error_and_no_hang(wrong: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, (2, str(tmp_path), wrong), nprocs=2)
    assert "another process of the group has ended, or did not calibrate" in (tmp_path / "told.0").read_text()


MODELS = """
import os, torch
from torch import nn
def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).eval(), (torch.randn(2, 16),)
def other():
    torch.manual_seed(int(os.environ["RANK"]))
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).eval(), (torch.randn(2, 16),)
def data():
    torch.manual_seed(1)
    return (torch.randn(2, 16) for _ in range(5))
"""


@pytest.mark.slow
def test_torchrun_writes_the_file_once_and_prints_it_once() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ranked.py").write_text(MODELS)
        path = os.pathsep.join((folder, str(Path(qcompile.__file__).parents[1])))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        torchrun = [*["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]]
        torchrun += ["--rdzv-endpoint", "localhost:0"]

        def run(*argv: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, *argv, "--calibration", "ranked:data"]
            return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

        one = run("-m", "qcompile", "export", "ranked:make", "-o", "one.onnx")
        two = run(*torchrun, "-m", "qcompile", "export", "ranked:make", "-o", "two.onnx")
        assert (one.returncode, two.returncode) == (0, 0), two.stderr
        assert Path(folder, "one.onnx").read_bytes() == Path(folder, "two.onnx").read_bytes()
        assert two.stdout == one.stdout and two.stderr.count("exporting to two.onnx") == 1
        wrong = run(*torchrun, "-m", "qcompile", "export", "ranked:other", "-o", "three.onnx")
        assert wrong.returncode and wrong.stderr.count("error: ") == wrong.stderr.count("different models") == 1
        assert not Path(folder, "three.onnx").exists()
