"""Every figure that README and docs show is the one that was measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.text import PAGES, README, ROOT, TEMPLATES, render, same, stale

DOCS = sorted((ROOT / "docs").glob("*.md"))
# Numbers with a unit of measurement, and shares with three digits or more.
_FIGURE = re.compile(
    r"\b(?:\d+\.\d+\s?x|\d+(?:\.\d+)?\s?(?:%|ms|s|min|GB|MB|kB))(?!\w)|\b0?\.\d{3,}|\b\d{1,3}(?:,\d{3})+\b"
)


def test_no_figure_differs_from_its_measurement() -> None:
    assert not [path.name for path in stale()], "run python -m benchmarks.text"


@pytest.mark.parametrize("path", [README, *(page for page in DOCS if page not in PAGES)], ids=lambda path: path.stem)
def test_no_figure_is_written_by_hand(path: Path) -> None:
    """Outside of what benchmarks.text writes, pages hold no number that looks measured."""
    text = re.sub(r"<!-- figures.*?<!-- end of figures -->", "", path.read_text(), flags=re.DOTALL)
    text = re.sub(r"```.*?```|^    qcompile .*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    found = [figure[0] for figure in _FIGURE.finditer(text)]
    assert not found


@pytest.mark.parametrize("template", [path.name for path in sorted(TEMPLATES.glob("*.md"))])
def test_templates_write_no_result_by_hand(template: str) -> None:
    source = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", (TEMPLATES / template).read_text(), flags=re.DOTALL)
    assert not [figure[0] for figure in _FIGURE.finditer(source)]
    assert render(template).strip()


def test_a_text_speaks_for_several_rows_only_where_they_agree() -> None:
    rows = [{"model": "a", "kernels": 9}, {"model": "b", "kernels": 9}, {"model": "c", "kernels": 10}]
    assert same(rows, "kernels", model=["a", "b"]) == 9
    with pytest.raises(ValueError, match="is \\[9, 10\\], not one value"):
        same(rows, "kernels", model=["a", "c"])
    with pytest.raises(ValueError, match="is \\[\\]"):
        same(rows, "kernels", model="d")


def test_every_script_that_a_text_names_is_there() -> None:
    for path in (README, *DOCS):
        for name in re.findall(r"python -m benchmarks\.(\w+)", path.read_text()):
            assert (Path(ROOT) / "benchmarks" / f"{name}.py").exists() or (ROOT / "benchmarks" / name).is_dir(), name
