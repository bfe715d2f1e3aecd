"""No six lines of code stand in two places."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import passes
import qcompile

LINES = 6


def test_no_code_is_repeated() -> None:
    places: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for package in (passes, qcompile):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            lines = code_lines(path.read_text(encoding="utf-8"))
            for index in range(len(lines) - LINES + 1):
                window = lines[index : index + LINES]
                name = f"{path.relative_to(root.parent).as_posix()}:{window[0][0]}"
                places[tuple(line for _, line in window)].add(name)
    assert len(places) > 10_000
    assert [sorted(found) for found in places.values() if len(found) > 1] == []


def code_lines(source: str) -> list[tuple[int, str]]:
    """(number, text) of the lines that do something: no docstrings, imports, signatures, comments, closing brackets."""
    tree, silent = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            silent |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        if isinstance(node, ast.FunctionDef):
            silent |= set(range(node.lineno, node.body[0].lineno))
        if isinstance(node, ast.Import | ast.ImportFrom):
            silent |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    texts = ((number, line.partition("  #")[0].strip()) for number, line in enumerate(source.splitlines(), 1))
    return [(n, text) for n, text in texts if n not in silent and text.strip("()[]{},") and not text.startswith("#")]
