"""What there is one way of: to write a file, and to show that work goes on."""

from __future__ import annotations

import ast
import functools
import io
import sys
from pathlib import Path

import pytest

import passes
import qcompile
from qcompile.progress import progress_bar

_WRITES = {"write_text", "write_bytes", "copyfile", "copy", "copy2", "savez", "save_file", "dump", "save"}
_WRITERS = {
    "passes/__main__.py": "pages of the catalogue, into the checkout of who asks",
    "passes/observe.py": "a trace, into a folder of its own: what is there of it is read while it grows",
    "qcompile/checkpoint/files/directory.py": "into the folder of `new_directory`, which is moved when it is whole",
    "qcompile/checkpoint/files/shards.py": "into the folder of `new_directory`",
    "qcompile/cli/console.py": "a report, through `replaced`",
    "qcompile/cli/process.py": "the null device in the place of a stream that is closed",
    "qcompile/cli/quantize.py": "a program, through `replaced`",
    "qcompile/engine/build.py": "an engine, through `replaced`",
    "qcompile/files.py": "the one way itself",
    "qcompile/generation/directory.py": "what goes beside a decoder's file, through `replaced`",
    "qcompile/onnx/repair/repair.py": "into the folder of `onnx_folder`, which moves what is whole",
    "qcompile/onnx/save.py": "into the folder of `onnx_folder`",
    "qcompile/onnx/wire.py": "for save.py, in the same folder",
    "qcompile/source/state_files.py": "a calibrated state, through `replaced`",
}
"""File -> what it writes to a disk, and how that is whole or not at all."""


@functools.cache
def sources() -> list[tuple[str, ast.Module]]:
    found = []
    for package in (passes, qcompile):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            found.append((path.relative_to(root.parent).as_posix(), ast.parse(path.read_text(encoding="utf-8"))))
    return found


def writes(node: ast.AST) -> bool:
    """Whether it may write a file: `open` for writing, or a call of what libraries call so."""
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name == "open":
        words = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        return any(isinstance(word, str) and set("wax+") & set(word) and len(word) <= 3 for word in words)
    owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    if name in ("copy", "dump", "save"):  # of objects, of YAML as text
        return owner in ("shutil", "json", "onnx", "onnx_ir", "torch", "torch.export", "numpy", "np")
    return name in _WRITES


def test_who_writes_files() -> None:
    found = {name for name, tree in sources() if any(map(writes, ast.walk(tree)))}
    assert found == set(_WRITERS)


def test_who_draws_bars() -> None:
    modules = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and node.module == "rich.progress")
        or (isinstance(node, ast.Import) and any(alias.name == "rich.progress" for alias in node.names))
    }
    assert modules == {"qcompile/progress.py"}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("wished", [True, False])
def test_a_bar_is_for_who_watches(monkeypatch: pytest.MonkeyPatch, watched: bool, wished: bool) -> None:
    stream = _Terminal() if watched else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    with progress_bar("work", None, wished) as bar:
        bar.phase("layer [red]0[/red]", 1, 4)
        bar.advance(2)
    shown = stream.getvalue()
    assert ("layer [red]0[/red]" in shown and "3/4" in shown) if watched and wished else not shown
