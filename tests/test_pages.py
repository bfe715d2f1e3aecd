"""README, docs and the pages beside them: every link leads somewhere, and README stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qcompile import list_recipes

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.md"))]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The page without code, in which brackets mean something else."""
    return re.sub(
        r"```.*?```|^    .*?$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


def anchors(page: Path) -> set[str]:
    """What a link to a heading is called: lower case, words joined by hyphens, without punctuation."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path) -> Iterator[str]:
    for link in _LINK.findall(prose(page)):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if name.startswith("/") or not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    assert not list(broken(page))


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A, b\n[1](#a-b) [2](#b) [3](gone.md) [4](/etc) `[5](code.md)`\n", encoding="utf-8")
    assert list(broken(page)) == ["#b", "gone.md", "/etc"]


def test_every_page_is_within_reach_of_readme() -> None:
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [page.parent / link.partition("#")[0] for link in _LINK.findall(prose(page)) if link[0] != "#"]
    assert {page.resolve() for page in PAGES} <= reached


def test_readme_is_short_and_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    commands = [line.strip() for line in lines[:40] if line.startswith("    python3 -m venv .venv && ")]
    assert [command.rpartition("&& ")[2] for command in commands] == [
        ".venv/bin/qcompile demo",
        ".venv/bin/pytest -n 2",
    ]


def test_every_shipped_recipe_is_in_the_table() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert set(list_recipes()) == set(re.findall(r"^\| `([\w-]+)` \|", page, flags=re.MULTILINE))


def test_every_file_that_contributing_names_is_there() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    made_up = re.compile(r"NAME|STAGE|^\.hypothesis")
    named = {name for name in re.findall(r"`([\w./-]+/[\w./-]*)`", page) if not made_up.search(name)}
    assert named and not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_told_in_words_and_drawn_for_both_modes(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    space = "{http://www.w3.org/2000/svg}"
    told = {child.get("id"): child.text for child in root if child.tag in (f"{space}title", f"{space}desc")}
    assert root.get("aria-labelledby") == "title desc" and all(told[name] for name in ("title", "desc"))
    bright, _, dark = (root.findtext(f"{space}style") or "").partition("@media (prefers-color-scheme: dark)")
    used = {word for element in root.iter() for word in element.get("class", "").split()}
    for style in (bright, dark):
        assert set(re.findall(r"\.(\w+) \{", style)) == used
