"""Writes the figures that README and docs show, from benchmarks/results: `python -m benchmarks.text`.

docs/results.md is made of benchmarks/templates/results.md, and what stands in README and other pages between
`<!-- figures: NAME -->` and `<!-- end of figures -->` of benchmarks/templates/NAME.md. `--check` writes nothing and
says what is out of date; tests/benchmarks/test_text.py runs it, so that no figure can differ from its measurement.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.record import RESULTS

ROOT = Path(__file__).parent.parent
TEMPLATES = Path(__file__).parent / "templates"
PAGES = {ROOT / "docs" / "results.md": "results.md"}
README = ROOT / "README.md"
WITH_BLOCKS = (README, ROOT / "docs" / "start.md", ROOT / "docs" / "decoders-engines.md")
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end of figures -->)", re.DOTALL)


def row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row with these values. Raises ValueError if there is none, or several that differ in a figure."""
    found = [r for r in rows if all(r.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows of the results have {wanted}")
    return found[0]


def same(rows: list[dict[str, Any]], key: str, **wanted: Any) -> Any:
    """The value of `key` in all rows with these values. A list stands for any of its members.

    Raises ValueError where rows differ: a text that speaks for several would be wrong for some of them.
    """

    def fits(r: dict[str, Any]) -> bool:
        return all(r.get(k) in v if isinstance(v, list) else r.get(k) == v for k, v in wanted.items())

    values = {r[key] for r in rows if fits(r)}
    if len(values) != 1:
        raise ValueError(f"{key} of the rows with {wanted} is {sorted(values)}, not one value")
    return values.pop()


def render(template: str) -> str:
    """The text that `template` becomes with the results as they are."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["thousands"] = lambda number: f"{number:,}"
    records = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    results = {name: record["results"] for name, record in records.items()}
    settings = {name: record["settings"] for name, record in records.items()}
    return environment.get_template(template).render(results, row=row, same=same, settings=settings)


def texts() -> dict[Path, str]:
    """Path -> what should stand there."""
    pages = {path: render(template) for path, template in PAGES.items()}
    for path in WITH_BLOCKS:
        pages[path] = _BLOCK.sub(lambda found: found[1] + render(f"{found[2]}.md") + found[4], path.read_text())
    return pages


def stale() -> list[Path]:
    """Files whose figures differ from the results."""
    return [path for path, text in texts().items() if not path.exists() or path.read_text() != text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is out of date")
    if parser.parse_args().check:
        for path in (old := stale()):
            print(f"{path.relative_to(ROOT)} is out of date: run python -m benchmarks.text", file=sys.stderr)
        return 1 if old else 0
    for path, text in texts().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
