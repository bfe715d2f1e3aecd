"""The catalogue of passes: which there are, by stage, and what their docstrings say, as text and as Markdown."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import passes
from passes.base import Pass
from passes.places import stage_of

__all__ = ["STAGES", "Entry", "catalogue", "find", "pages", "table"]

STAGES = ("canonicalize", "normalize", "quantize", "place", "fuse", "fold", "legalize", "lower")
_SECTION = re.compile(r"^(Before[^:\n]*|After[^:\n]*|Requires|Ensures|Declines when|Why):", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """A pass of the catalogue.

    Attributes:
        name, stage, summary, doc: of its class: the name, the folder, the first line and the whole of its docstring.
        file: where it is, below the folder of `passes`.
    """

    name: str
    stage: str
    summary: str
    doc: str
    file: str

    def section(self, title: str) -> str:
        """What its docstring says under `title`, such as "Requires"; empty if nothing."""
        parts = _SECTION.split(self.doc)
        return next((text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True) if name == title), "")


@cache
def catalogue() -> tuple[Entry, ...]:
    """All passes, stage by stage and by name."""
    return tuple(sorted(_entries(), key=lambda entry: (STAGES.index(entry.stage), entry.name)))


def find(name: str) -> Entry | None:
    """The pass of that name."""
    return next((entry for entry in catalogue() if entry.name == name), None)


def table() -> str:
    """Stage, name and summary, a line a pass."""
    width = max(len(entry.name) for entry in catalogue())
    lines: list[str] = []
    for stage in STAGES:
        lines += ["", f"{stage}: {_about(stage)}", ""]
        lines += [f"  {e.name:{width}}  {e.summary}" for e in catalogue() if e.stage == stage]
    return "\n".join(lines).lstrip()


def pages() -> dict[str, str]:
    """File name -> Markdown: one page a stage, and README.md with the table of all."""
    front = [
        "# The passes\n",
        "Made from the docstrings by `python -m passes --markdown docs/passes`: what each looks for, what it leaves,",
        "and why. A graph goes through the stages from top to bottom, in the order of `passes/pipelines.py`.\n",
    ]
    found = {}
    for stage in STAGES:
        entries = [entry for entry in catalogue() if entry.stage == stage]
        front += [f"\n## [{stage}]({stage}.md)\n", f"{_about(stage)}\n", "| pass | |", "|---|---|"]
        front += [f"| [{e.name}]({stage}.md#{e.name.lower()}) | {_escaped(e.summary)} |" for e in entries]
        found[f"{stage}.md"] = "\n".join([f"# {stage}\n", f"{_about(stage)}\n", *map(_chapter, entries)])
    return {"README.md": "\n".join(front) + "\n", **found}


def _chapter(entry: Entry) -> str:
    """A pass in Markdown: text as it is, graphs as code."""
    head, *parts = _SECTION.split(entry.doc)
    lines = [f"## {entry.name}\n", f"{_escaped(head.strip())}\n", f"In `passes/{entry.file}`.\n"]
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        if title.startswith(("Before", "After")):
            code, _, rest = text.strip("\n").partition("\n\n")
            lines += [f"{title}:\n", f"```text\n{inspect.cleandoc(code)}\n```\n"]
            lines += [f"{_escaped(inspect.cleandoc(rest))}\n"] if rest.strip() else []
        else:
            lines.append(f"**{title}:** {_escaped(' '.join(text.split()))}\n")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """`text` without what Markdown would take for its own: stars and bars, brackets; what is in ticks stays."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_|<\[\]])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _about(stage: str) -> str:
    """What the docstring of a stage says: its first line, without its number."""
    said = (importlib.import_module(f"passes.{stage}").__doc__ or "").strip().partition("\n")[0]
    return re.sub(r"^Stage \d+: (.)", lambda found: found[1].upper(), said)


def _entries() -> Iterator[Entry]:
    for info in pkgutil.walk_packages(passes.__path__, "passes."):
        if info.name.split(".")[1] not in STAGES or info.ispkg:
            continue
        module = importlib.import_module(info.name)
        for made in vars(module).values():
            if _is_pass(made) and made.__module__ == info.name:
                doc = inspect.cleandoc(made.__doc__ or "")
                summary = " ".join(doc.partition("\n\n")[0].split())
                file = "/".join(info.name.split(".")[1:]) + ".py"
                yield Entry(made.__name__, stage_of(made), summary, doc, file)


def _is_pass(made: object) -> bool:
    return isinstance(made, type) and issubclass(made, Pass) and not inspect.isabstract(made)
