"""What a trace writes, when it costs nothing, and what a disk that refuses it costs."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from passes import observe, trace
from passes.base import Pass, run_pipeline
from passes.errors import PassError, QCompileError
from tests.passes.test_base import Doubles, graph


class Fails(Pass):
    """Fails."""

    def rewrite(self, gm: GraphModule) -> None:
        raise KeyError("nothing | there")


class Idle(Pass):
    """Does nothing."""

    def rewrite(self, gm: GraphModule) -> None:
        pass


def test_a_trace_tells_what_each_pass_did(tmp_path: Path) -> None:
    with trace(tmp_path / "new") as folder:
        run_pipeline((Idle, Doubles, Idle), graph(1, 3))
        run_pipeline((Idle,), graph(1))
    assert folder.parent == tmp_path / "new"
    assert sorted(p.name for p in folder.iterdir()) == ["01-own", "02-own", "index.md"]
    assert sorted(p.name for p in (folder / "01-own").iterdir()) == ["00-start.txt", "02-Doubles.txt", "index.json"]
    assert "add.Tensor(x0, 1)" in (folder / "01-own" / "00-start.txt").read_text()
    assert "mul.Tensor(x0, 2)" in (folder / "01-own" / "02-Doubles.txt").read_text()
    index = json.loads((folder / "01-own" / "index.json").read_text())
    assert [row["pass"] for row in index["passes"]] == ["Idle", "Doubles", "Idle"]
    row = index["passes"][1]
    assert row["fired"] == 1 and 0 < row["seconds"] <= index["seconds"]
    assert (row["before"], row["after"]) == ("00-start.txt", "02-Doubles.txt")
    assert row["declined"] == [{"reason": "adds something else", "module": "layers.0", "nodes": ["add_tensor_1", "x0"]}]
    assert (index["passes"][2]["before"], index["passes"][2]["after"]) == ("02-Doubles.txt", None)
    page = (folder / "index.md").read_text()
    assert "[02-Doubles.txt](01-own/02-Doubles.txt)" in page and "Idle" not in page and "Nothing fired." in page


def test_a_pass_that_fails_is_the_last_one_of_its_trace(tmp_path: Path) -> None:
    with trace(tmp_path) as folder, pytest.raises(PassError, match="Fails failed"):
        run_pipeline((Doubles, Fails, Idle), graph(1))
    rows = json.loads((folder / "01-own" / "index.json").read_text())["passes"]
    assert [row["pass"] for row in rows] == ["Doubles", "Fails"] and "nothing | there" in rows[1]["error"]
    assert "nothing \\| there" in (folder / "index.md").read_text()


def test_traces_do_not_overwrite_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe.time, "strftime", lambda _: "20260101-000000")
    folders = set()
    for _ in range(3):
        with trace(tmp_path) as folder:
            run_pipeline((Doubles,), graph(1))
        folders.add(folder)
    assert len(folders) == 3 and all((folder / "01-own" / "02-x.txt").exists() is False for folder in folders)
    assert len(list(tmp_path.glob("*/01-own/01-Doubles.txt"))) == 3


@pytest.mark.slow
def test_processes_have_folders_of_their_own(tmp_path: Path) -> None:
    code = (
        "from tests.passes.test_base import *; import os\n"
        "run_pipeline((Doubles,), graph(1)); child = os.fork(); run_pipeline((Doubles,), graph(1))\n"
        "os._exit(0) if not child else os.waitpid(child, 0)"
    )
    environment = {**os.environ, observe.VARIABLE: str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert sorted(len(list(folder.iterdir())) for folder in tmp_path.iterdir()) == [2, 3]  # of the child, of the parent


def test_the_variable_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(observe.VARIABLE, str(tmp_path / "of variable"))
    run_pipeline((Doubles,), graph(1))
    with trace(tmp_path / "of argument"):
        run_pipeline((Doubles,), graph(1))
    run_pipeline((Doubles,), graph(1))
    names = [sorted(p.name for p in d.iterdir()) for d in (tmp_path / "of variable").iterdir()]
    assert names == [["01-own", "02-own", "index.md"]]
    assert len(list((tmp_path / "of argument").glob("*/01-own"))) == 1


def test_without_a_trace_no_graph_is_written_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(observe.VARIABLE, raising=False)
    monkeypatch.setattr(observe, "graph_text", lambda gm: pytest.fail("nobody asked"))
    assert run_pipeline((Doubles,), graph(1)).fired == {"Doubles": 1}


def test_a_full_disk_costs_the_trace_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    gm = graph(1)
    with trace(tmp_path), caplog.at_level(logging.WARNING):
        monkeypatch.setattr(Path, "write_text", full)
        for _ in range(3):
            run_pipeline((Doubles,), gm)
    assert [float(y[0]) for y in gm(torch.ones(2))] == [2.0]
    (told,) = caplog.messages
    assert "No space left on device" in told and str(tmp_path) in told


def test_a_directory_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QCompileError, match=r"cannot write a trace to .*file: "), trace(tmp_path / "file"):
        pytest.fail("it is a file")
    monkeypatch.setenv(observe.VARIABLE, str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert [run_pipeline((Doubles,), graph(1)).fired["Doubles"] for _ in range(2)] == [1, 1]
    (told,) = caplog.messages
    assert f"{observe.VARIABLE}={tmp_path / 'file'}: no trace is written" in told
