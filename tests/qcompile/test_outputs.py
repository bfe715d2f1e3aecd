"""What is written, by whom, and to what: right, or refused before the work, and never at the cost of another file."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import qcompile
from qcompile import files
from qcompile.checkpoint.files.directory import new_directory
from qcompile.cli import main
from qcompile.cli.console import write_report
from qcompile.cli.quantize import save
from qcompile.engine import build
from qcompile.errors import EngineError, QCompileError
from qcompile.report.base import ReportBase

X = torch.randn(2, 16)


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    recipe = qcompile.load_recipe("fp8_per_channel_per_token")
    return qcompile.quantize(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16)), (X,), recipe=recipe, progress=False)


@pytest.fixture(scope="module")
def filled(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    save(program, folder / "p.pt2")
    qcompile.export_onnx(program, folder / "m.onnx")
    torch.save({"x": X}, folder / "cal.pt")
    (folder / "r.yaml").write_text("metadata: {name: mine}\nrules: []\n")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def here(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a program, an ONNX file, data and other things that people have."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    (tmp_path / "same.pt2").symlink_to("p.pt2")
    (tmp_path / "nowhere").symlink_to("none")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and not file.is_symlink()}


EXPORT = ("export", "p.pt2")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((*EXPORT, "-o", "p.pt2"), "--output p.pt2 is the model"),
        ((*EXPORT, "-o", "./model/../p.pt2"), "is the model"),
        ((*EXPORT, "-o", "same.pt2"), "same.pt2 is the model"),
        ((*EXPORT, "-o", "n.onnx", "--save-program", "p.pt2"), "--save-program p.pt2 is the model"),
        ((*EXPORT, "-o", "cal.pt", "--calibration", "cal.pt"), "cal.pt is the calibration data"),
        ((*EXPORT, "-o", "n.onnx", "--report", "r.yaml", "--recipe", "r.yaml"), "r.yaml is the recipe"),
        (("export", "model", "-o", "model/config.json"), "config.json is the model"),
        ((*EXPORT, "-o", "n", "--report", "n"), "--output and --report are one file"),
        ((*EXPORT, "-o", "n", "--report", "model/../n"), "--output and --report are one file"),
        ((*EXPORT, "-o", "n.onnx", "--report", "n.onnx.data"), "--output and --report are one file"),
        ((*EXPORT, "-o", "n", "--save-program", "n"), "--output and --save-program are one file"),
        ((*EXPORT, "-o", "n", "--engine", "n", "--target", "sm89"), "--output and --engine are one file"),
        (("build", "m.onnx", "-o", "m.onnx", "--target", "sm89"), "m.onnx is the ONNX file"),
        (("build", "m.onnx", "--report", "m.onnx", "--target", "sm89"), "--report m.onnx is the ONNX file"),
        (("build", "m.onnx", "-o", "e", "--report", "e", "--target", "sm89"), "are one file"),
        (("repair", "m.onnx", "m.onnx"), "m.onnx is part of the old file, which is never changed"),
        (("repair", "m.onnx", "n.onnx", "--report", "n.onnx"), "are one file"),
        ((*EXPORT, "-o", "pipe"), "no regular file"),
        ((*EXPORT, "-o", "nowhere"), "a link to nothing"),
        ((*EXPORT, "-o", "model"), "it is a directory"),
        (("build", "m.onnx", "-o", "pipe", "--target", "sm89"), "no regular file"),
        (("repair", "m.onnx", "pipe"), "no regular file"),
        ((*EXPORT, "-o", ""), "-o is given nothing"),
        ((*EXPORT, "-o", "n.onnx", "--recipe="), "--recipe is given nothing"),
        ((*EXPORT, "-o", "n.onnx", "--random-weights", str(2**63)), "a seed is 0 or more"),
        ((*EXPORT, "-o", "n.onnx", "--batch", str(2**70)), "a size is 1 or more, and at most"),
    ],
)
def test_refused_before_any_work(
    here: Path, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before, names = content(here), sorted(os.listdir(here))
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert content(here) == before and sorted(os.listdir(here)) == names


def test_an_engine_in_the_place_of_its_own_file(here: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    onnx.save(onnx.load("m.onnx"), "w.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    before = content(here)
    for output in ("w.onnx", "w.bin"):
        with pytest.raises(EngineError, match=f"the engine {output} is (the ONNX file|its file of weights)"):
            qcompile.build_engine("w.onnx", output, target="sm89", progress=False)
    assert content(here) == before
    (here / "linked").mkdir()
    (here / "linked" / "w.onnx").symlink_to(here / "w.onnx")
    assert qcompile.build_engine("linked/w.onnx", "e", target="sm89", progress=False).kernels
    (here / "w.bin").unlink()
    with pytest.raises(EngineError, match=r"w.onnx' is incomplete: .*w.bin', which is not beside the model"):
        qcompile.build_engine("w.onnx", "f", target="sm89", progress=False)


def fill(path: Path, program: ExportedProgram) -> None:
    with new_directory(path) as folder:
        (folder / "weights").write_bytes(bytes(10_000))


Writer = Callable[[Path, ExportedProgram], Any]
FILES: dict[str, Writer] = {
    "ONNX file": lambda path, program: qcompile.export_onnx(program, path),
    "repaired file": lambda path, _: qcompile.repair_onnx("m.onnx", path),
    "program": lambda path, program: save(program, path),
    "report": lambda path, _: write_report(path, ReportBase(kind="any", notices=["x" * 10_000])),
    "engine": lambda path, _: build._write(path, bytes(10_000)),
}
WRITERS: dict[str, Writer] = {**FILES, "checkpoint": fill}


@pytest.mark.parametrize("name", FILES)
def test_links_and_modes_stay(name: str, here: Path, program: ExportedProgram) -> None:
    (here / "elsewhere").mkdir()
    real, link = here / "elsewhere" / "real.pt2", here / "link.pt2"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    FILES[name](link, program)
    assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o640 and real.read_bytes() != b"old"
    FILES[name](here / "new.pt2", program)
    assert (here / "new.pt2").read_bytes() == real.read_bytes()
    assert os.listdir(here / "elsewhere") == ["real.pt2"] and not list(here.glob(".qcompile-*"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_sentence_and_costs_nothing(name: str, here: Path, program: ExportedProgram) -> None:
    path = here / "out.pt2"
    if name in FILES:
        path.write_bytes(b"old")
    before = sorted(os.listdir(here))

    def write(queue: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))  # of each file: as a disk that is full after 2 kB
        try:
            WRITERS[name](path, program)
            queue.put("written")
        except BaseException as error:
            queue.put(f"{isinstance(error, QCompileError)} {error}")

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=write, args=(queue,))
    process.start()
    said = queue.get(timeout=60)
    process.join()
    assert process.exitcode == 0 and said.startswith("True cannot write") and "no room is left on the disk" in said, (
        said
    )
    assert sorted(os.listdir(here)) == before
    assert name not in FILES or path.read_bytes() == b"old"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root can mount, and not everywhere")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_is_full_or_read_only(here: Path, small_disk: Path, program: ExportedProgram) -> None:
    for name, write in WRITERS.items():
        with pytest.raises(QCompileError, match=r"no room"):
            for number in range(4):  # some are smaller than others
                write(small_disk / f"{name}{number}", program)
        assert not list(small_disk.glob(".qcompile-*")), name
        for file in small_disk.iterdir():
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for write in WRITERS.values():
        with pytest.raises(QCompileError, match=r"cannot write|not writable"):
            write(small_disk / "new", program)


def test_ctrl_c_in_the_builder_cancels_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    seen: list[str] = []

    def step(phase: str, done: int, total: int) -> None:
        seen.append(phase)
        if phase != "Parsing" and seen.count(phase) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(build, "_progress", lambda *_: contextlib.nullcontext(step))
    with pytest.raises(KeyboardInterrupt):
        qcompile.build_engine("m.onnx", "e", target="sm89")
    assert not (here / "e").exists() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    count = len(seen)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert count and qcompile.build_engine("m.onnx", "e", target="sm89", progress=False).kernels


def test_what_a_dead_process_left_goes_and_a_living_one_has_stays(here: Path, program: ExportedProgram) -> None:
    def dies() -> None:
        with files.folder_beside(here / "out.pt2") as folder:
            (folder / "out.pt2").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=dies)
    process.start()
    process.join()
    (mine := here / ".qcompile-12345678").mkdir()
    (mine / "precious").touch()
    with files.folder_beside(here / "other") as living:
        assert len(list(here.glob(".qcompile-*"))) == 2 + (process.exitcode is None)
        save(program, here / "out.pt2")
        assert living.exists()
    assert [path.name for path in here.glob(".qcompile-*")] == [mine.name] and (mine / "precious").exists()


def test_a_report_that_falls_short_is_written_and_says_what_is_new(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    (here / "e").write_bytes(b"old")
    wanted = ("--engine", "e", "--target", "sm89", "--expect", "gemm_fp8=99", "--report", "r.json", "--no-compare")
    assert main((*EXPORT, "-o", "n.onnx", *wanted)) == 1
    assert "n.onnx is new, and nothing else" in capsys.readouterr().err
    assert (here / "e").read_bytes() == b"old" and (here / "n.onnx").exists()
    assert json.loads((here / "r.json").read_text())["new"] == ["n.onnx"]
    assert main(("inspect", "r.json")) == 1
    assert "99" in capsys.readouterr().err


def test_a_current_directory_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(("recipes", "list")) == 2
    assert "the current directory is gone" in capsys.readouterr().err


def command(*argv: str, **options: Any) -> subprocess.Popen[str]:
    def heed() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which shells ignore in the background

    return subprocess.Popen([sys.executable, "-m", "qcompile", *argv], text=True, preexec_fn=heed, **options)


PIPE = subprocess.PIPE


def test_nobody_reads_or_cannot_read_what_is_printed(here: Path) -> None:
    """A pipe that is closed after a line, no stdout at all, a terminal of ASCII."""
    closed = command(*EXPORT, "-o", "n.onnx", "--no-compare", "--report", "r.json", stdout=PIPE, stderr=PIPE)
    assert closed.stdout is not None
    closed.stdout.close()
    ascii_only = command("recipes", "list", env={**os.environ, "PYTHONIOENCODING": "ascii"}, stdout=PIPE, stderr=PIPE)
    shell = [sys.executable, "-m", "qcompile", "inspect", "m.onnx"]
    none = subprocess.run(f"{' '.join(shell)} >&-", shell=True, text=True, capture_output=True)
    assert (closed.wait(), (here / "r.json").exists()) == (0, True), closed.stderr.read()  # type: ignore[union-attr]
    assert (none.returncode, none.stderr) == (0, "")
    assert ascii_only.wait() == 0


def heeds_sigterm(process: int) -> bool:
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    (caught,) = (line.split()[1] for line in status if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="where Linux tells which signals are heeded")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(number: signal.Signals, here: Path) -> None:
    """While torch is imported, too: one line, the exit code of Ctrl-C, nothing left behind."""
    process = command(*EXPORT, "-o", "n.onnx", "--save-program", "q.pt2", stderr=PIPE)
    if number == signal.SIGINT:
        os.read(process.stderr.fileno(), 1)  # type: ignore[union-attr]  # it has begun to work
    while not heeds_sigterm(process.pid):
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate()[1]
    # Python ends itself by SIGINT if one came inside of eval(); a shell sees 130 then, too
    assert (
        process.returncode in (130, -signal.SIGINT)
        and "Traceback" not in said
        and said.endswith("error: interrupted\n")
    ), said
    assert not list(here.glob(".qcompile-*"))
