"""What errors and tables show of values and names that somebody else wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcompile.cli import main
from qcompile.errors import QCompileError
from qcompile.messages import first_line, some, value

EVIL = "\x1b[2J\x1b]0;title\x07\r\x9b\u202e"


def doubled(levels: int) -> list[Any]:
    found: list[Any] = ["x"]
    for _ in range(levels):
        found = [found, found, found, found, found, found, found, found, found]
    return found


def circle() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["again"] = [found]
    return found


@pytest.mark.parametrize(
    ("found", "beginning"),
    [
        ("short", "'short'"),
        ({"b": 1, "a": [None, True]}, "{'b': 1, 'a': [None, True]}"),
        ("x" * 10**6, "'xxxx"),
        (doubled(8), "[["),
        (circle(), "{'again': ["),
        (10**6000, "a number of 19932 bits"),
        (-(10**6000), "a number of 19932 bits"),
        (list(range(10**5)), "[0, 1, 2"),
        ({str(i): i for i in range(10**5)}, "{'0': 0, '1': 1"),
    ],
    ids=range(9),
)
def test_a_value_is_cut(found: object, beginning: str) -> None:
    assert value(found).startswith(beginning)
    assert len(value(found)) <= 120


def test_messages_are_cut_and_have_no_control_characters() -> None:
    message = str(QCompileError(f"{EVIL} is in the way\nof {'x' * 10**7} at the end"))
    assert message.replace("\n", "").isprintable() and len(message) <= 4_000
    assert message.startswith(r"\x1b[2J\x1b]0;title\x07\r\x9b\u202e is in the way" + "\nof xx")
    assert message.endswith("at the end")
    assert len(first_line(ValueError("x" * 10**7))) <= 500
    assert len(some(["x" * 10**7, "y", "z", "w"])) <= 250


def test_tables_obey_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of modules, notices, titles and the source, with what terminals and rich take for commands."""
    engine = {"kind": "engine", "target": f"{EVIL}[/bold]", "builder": "b", "bytes": 1, "seconds": 1, "kernels": 1}
    parts = {"total": 0, "fused": 0, "fp8": 0}
    engine |= {"attention": parts, "gemms": {EVIL: 1}, "convolutions": {}, "notices": [EVIL], "layers": []}
    engine["not_low_precision"] = [[EVIL, EVIL, EVIL]]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"kind": "command", "source": EVIL, "engine": engine}))
    assert main(["inspect", str(report)]) == 0
    captured = capsys.readouterr()
    assert (captured.out + captured.err).replace("\n", "").isprintable()
    assert captured.out.count(r"\x1b[2J") >= 6


CHECKPOINT = {"kind": "checkpoint", "format": "fp8", "kv_cache": False, "files": [], "seconds": 1}


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"kind": "export"}, "is not a whole report of this version: target: Field required, and "),
        ({"kind": "command", "source": "x", "export": [1]}, "is not a whole report"),
        ({"kind": "command", "source": "x", "engine": 5}, "is not a whole report"),
        ({"kind": "checkpoint", "bytes": 1, "files": 5}, "is not a whole report"),
        ({"kind": "repair", "bytes": 5}, "is not a whole report"),
        ({"kind": "export", "version": 7}, "version 7, where this qcompile has version 1: a newer one wrote it"),
        ({"kind": "export", "version": "1"}, "version '1', where"),
        ({"kind": "command", "source": "x", "repair": {"version": 7}}, "repair: a report of version 7"),
        ({"kind": "recipe"}, "a report of the kind 'recipe', which this qcompile does not know"),
        ({"kind": [1]}, "its kind is [1]"),
        ({**CHECKPOINT, "bytes": 10**400}, "is not a whole report of this version: OverflowError"),
        ({"export": {"recipe": "x", "bytes": "many"}}, "it has no kind"),
        ({"layers": [], "attention": []}, "it has no kind"),
        ([], "it holds [], and a report is an object"),
    ],
)
def test_reports_of_another_shape(report: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    assert main(["inspect", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file} is") and told in line


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000, '{"a": ', "\udcff"])
def test_reports_that_are_no_json(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main(["inspect", str(file)]) == 2
    assert f"{file} is not JSON" in capsys.readouterr().err
