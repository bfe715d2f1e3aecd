"""English sentences from the documentation of installed packages: real text, offline, the same on every run.

Modules gain members while a program imports more of them, so lists are made once.
"""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, zip_longest

_MODULES = (
    "argparse", "asyncio", "bisect", "calendar", "collections", "concurrent.futures", "configparser",
    "contextlib", "copy", "csv", "datetime", "decimal", "difflib", "email", "fractions", "functools", "glob",
    "heapq", "html", "http.client", "inspect", "itertools", "json", "logging", "mailbox", "math", "os",
    "pathlib", "pickle", "random", "sched", "shutil", "socket", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "urllib.request", "wave", "zipfile",
)  # fmt: skip


def sentences(calibration: int, evaluation: int) -> tuple[list[str], list[str]]:
    """Two disjoint lists of sentences, each drawn evenly from descriptions of data sets and from docstrings.

    Raises: RuntimeError if the installed packages hold fewer.
    """
    mixed = chain.from_iterable(zip_longest(_spread(_data_sets()), _spread(_docstrings())))
    unique = list(dict.fromkeys(sentence for sentence in mixed if sentence is not None))
    wanted = calibration + evaluation
    if len(unique) < wanted:
        raise RuntimeError(f"{wanted} sentences wanted, {len(unique)} found in the installed packages")
    return unique[:calibration], unique[calibration:wanted]


@cache
def data_set_sentences() -> list[str]:
    """Descriptions of data sets."""
    return _spread(_data_sets())


@cache
def docstring_sentences() -> list[str]:
    """First sentences of docstrings of the standard library."""
    return _spread(_docstrings())


@cache
def reference_sentences() -> list[str]:
    """The Python language reference, less what the two other kinds have."""
    known = {*data_set_sentences(), *docstring_sentences()}
    return [sentence for sentence in _spread(_reference()) if sentence not in known]


def connected_texts() -> dict[str, str]:
    """Paragraphs of prose, one after another: `docs` (the standard library's docstrings), `prose` (descriptions of data
    sets) and `reference` (the Python language reference, less what the other two have).
    """
    folder = importlib.resources.files("sklearn.datasets.descr")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".rst")), key=lambda file: file.name)
    modules = [importlib.import_module(name) for name in _MODULES]
    members = [getattr(module, name) for module in modules for name in sorted(dir(module)) if not name.startswith("_")]
    topics = sorted(importlib.import_module("pydoc_data.topics").topics.items())
    found = {
        "docs": _paragraphs(inspect.getdoc(member) or "" for member in members),
        "prose": _paragraphs(file.read_text(encoding="utf-8") for file in files),
    }
    known = {paragraph for paragraphs in found.values() for paragraph in paragraphs}
    found["reference"] = [text for text in _paragraphs(text for _, text in topics) if text not in known]
    return {kind: "\n\n".join(paragraphs) for kind, paragraphs in found.items()}


def _paragraphs(texts: Iterable[str]) -> list[str]:
    """Paragraphs of at least 15 words, nine tenths letters and spaces, each once."""
    joined = (" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text))
    long = (part for part in joined if len(part.split()) >= 15)
    letters = (part for part in long if sum(c.isalpha() or c == " " for c in part) >= 0.9 * len(part))
    return list(dict.fromkeys(letters))


def _spread(found: Iterator[str]) -> list[str]:
    """Reordered so that neighbours come from different places; 37 is coprime to any length but its multiples."""
    items = list(dict.fromkeys(found))
    step = 37 if len(items) % 37 else 41
    return [items[index * step % len(items)] for index in range(len(items))]


def _data_sets() -> Iterator[str]:
    folder = importlib.resources.files("sklearn.datasets.descr")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".rst"):
            yield from _split(file.read_text(encoding="utf-8"))


def _docstrings() -> Iterator[str]:
    for name in _MODULES:
        module = importlib.import_module(name)
        for member in sorted(dir(module)):
            if not member.startswith("_"):
                yield from list(_split(inspect.getdoc(getattr(module, member)) or ""))[:2]


def _reference() -> Iterator[str]:
    for _, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        yield from _split(text)


def _split(text: str) -> Iterator[str]:
    """Plain sentences of 6 to 40 words in `text`; markup, code and tables are left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", joined):
            words = len(sentence.split())
            if 6 <= words <= 40 and re.fullmatch(r"[A-Z][A-Za-z0-9 ,;'()\-]+\.", sentence):
                yield sentence
