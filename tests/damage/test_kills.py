"""Processes that are killed while they write: the old file or the new one is whole, and the next run tidies up."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from qcompile.checkpoint.files.directory import new_directory
from qcompile.checkpoint.files.shards import ShardWriter
from qcompile.cli.process import as_process
from qcompile.cli.quantize import save
from qcompile.engine import build
from qcompile.onnx import save as save_module

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SIZE = 200_000


@dataclass(frozen=True)
class Kind:
    """`write(path, 0)` and `write(path, 1)` write two versions; `read` returns which one is there, or raises."""

    write: Callable[[Path, int], None]
    read: Callable[[Path], int]
    files: int = 1


def version(values: Any) -> int:
    """0 or 1: whatever is written consists of these alone."""
    (found,) = np.unique(np.asarray(values))
    return int(found)


def write_onnx(path: Path, which: int) -> None:
    weight = numpy_helper.from_array(np.full(SIZE, which, dtype=np.float32), "w")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIZE]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])], f"graph {which}", *([v] for v in values), [weight]
    )
    with save_module.written_beside(onnx_ir.serde.deserialize_model(helper.make_model(graph)), path):
        pass


def read_onnx(path: Path) -> int:
    model = onnx.load(path)
    which = version(numpy_helper.to_array(model.graph.initializer[0]))
    assert model.graph.name == f"graph {which}", "a graph with the weights of another"
    return which


PROGRAMS = []
for number in (0, 1):
    layer = nn.Linear(400, 400)
    torch.nn.init.constant_(layer.weight, number)
    torch.nn.init.constant_(layer.bias, number)
    PROGRAMS.append(torch.export.export(layer, (torch.ones(1, 400),)))


def read_program(path: Path) -> int:
    state = torch.export.load(path).state_dict
    return version(torch.cat([tensor.flatten() for tensor in state.values()]).detach())


def write_checkpoint(path: Path, which: int) -> None:
    if path.exists():
        os.rename(path, path.parent.with_name(f"{path.parent.name}-{time.monotonic_ns()}"))
    with new_directory(path) as folder:
        writer = ShardWriter(folder, SIZE)
        for name in "abc":
            writer.add({name: torch.full((SIZE // 4,), float(which))})
        writer.close()


def read_checkpoint(path: Path) -> int:
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors"))
    assert len(files) == 3 and (path / "model.safetensors.index.json").is_file()
    return version(torch.cat([tensor for file in files for tensor in load_file(file).values()]))


KINDS = {
    "ONNX file": Kind(write_onnx, read_onnx),
    "ONNX file and weights": Kind(write_onnx, read_onnx, files=2),
    "engine": Kind(
        lambda path, which: build._write(path, bytes([which]) * SIZE),
        lambda path: version(np.frombuffer(path.read_bytes(), dtype=np.uint8)),
    ),
    "program": Kind(lambda path, which: save(PROGRAMS[which], path), read_program),
    "checkpoint": Kind(write_checkpoint, read_checkpoint),
}


def run_until_killed(kind: Kind, path: Path, number: signal.Signals, after: float) -> None:
    """A fork writes one version after the other until a signal comes."""
    process = os.fork()
    if not process:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells ignore in the background
            with as_process() as mine:
                mine.starting = False
                for which in itertools.cycle((1, 0)):
                    kind.write(path, which)
        finally:
            os._exit(0)
    time.sleep(after)
    ended = 0
    while not ended:  # a KeyboardInterrupt in a destructor is lost, as everywhere in Python
        os.kill(process, number)
        for _ in range(100):
            ended, _ = os.waitpid(process, os.WNOHANG)
            if ended:
                break
            time.sleep(0.01)


def kill_often(kind: Kind, path: Path, times: int) -> None:
    draw = random.Random(0)
    kind.write(path, 0)
    for round in range(times):
        number = SIGNALS[round % len(SIGNALS)]
        run_until_killed(kind, path, number, draw.uniform(0.0, 0.06))
        if (
            path.exists() or kind is not KINDS["checkpoint"]
        ):  # whose old one is moved away first: it takes a new directory
            assert kind.read(path) in (0, 1)
        kind.write(path, round % 2)
        assert kind.read(path) == round % 2
        left = [file.name for file in path.parent.iterdir()]
        assert len(left) == kind.files, f"left behind after signal {number}: {left}"


@pytest.mark.parametrize("name", [name for name in KINDS if name != "checkpoint"])
def test_two_processes_that_write_one_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "EMBEDDED_BYTES", 10**9 if KINDS[name].files == 1 else 0)
    kind, path, writers = KINDS[name], tmp_path / "out.pt2", []
    for which in (0, 1):
        if not (process := os.fork()):
            try:
                for _ in range(10):
                    kind.write(path, which)
            finally:
                os._exit(0)
        writers.append(process)
    for process in writers:
        os.waitpid(process, 0)
    assert kind.read(path) in (0, 1)
    assert len(list(tmp_path.iterdir())) == kind.files


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("times", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_old_or_new_and_nothing_left_behind(
    name: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_module, "EMBEDDED_BYTES", 10**9 if KINDS[name].files == 1 else 0)
    kill_often(KINDS[name], tmp_path / "out.pt2", times)
