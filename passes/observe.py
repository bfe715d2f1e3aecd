"""What happens round a pass, for who asks: its time, its counts and the graph before and after it, as files to read.

`QCOMPILE_TRACE=DIR` traces a process, `with passes.trace(DIR)` what runs in it. Nothing is timed or written otherwise.

    DIR/20260131-235959-4711/        one folder for each process and each `trace`
        index.md                     what fired, in order: the place to start
        01-normalize/                one folder for each pipeline that ran
            index.json               all passes: seconds, fired, declined, which file is before and which after
            00-start.txt             the graph
            08-NormalizeLinear.txt   the graph after the eighth pass; the file before it is the graph before it
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

from torch.fx import GraphModule

from passes.errors import QCompileError
from passes.text import graph_text

__all__ = ["VARIABLE", "PipelineTrace", "pipeline_trace", "trace"]

logger = logging.getLogger("qcompile")
VARIABLE = "QCOMPILE_TRACE"


class _Log(Protocol):
    fired: Counter[str]
    declined: list[Any]
    notices: list[str]


class _Session:
    """The folder of one process in a directory of traces. It gives up, and says so, where it cannot write."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.process = os.getpid()
        self.numbers = itertools.count(1)
        self.failed = False
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{self.process}"
        self.folder = _new_folder(Path(directory), (name, *(f"{name}-{again}" for again in range(2, 1000))))

    def give_up(self, error: OSError) -> None:
        if not self.failed:
            logger.warning("the trace in %s ends here: %s; what is compiled is not touched by that", self.folder, error)
        self.failed = True


class PipelineTrace:
    """Follows the passes of one pipeline over one graph."""

    def __init__(self, session: _Session, gm: GraphModule) -> None:
        self.session, self.number = session, next(session.numbers)
        self.rows: list[dict[str, Any]] = []
        self.texts = {"00-start.txt": graph_text(gm)}
        self.latest = "00-start.txt"

    @contextlib.contextmanager
    def around(self, name: str, stage: str, log: _Log, gm: GraphModule) -> Iterator[None]:
        """Note what the pass `name` does in the body."""
        fired, declined, notices = log.fired[name], len(log.declined), len(log.notices)
        row: dict[str, Any] = {"pass": name, "stage": stage}
        start = time.perf_counter()
        try:
            yield
        except BaseException as error:
            row["error"] = str(error) or type(error).__name__
            raise
        finally:
            row["seconds"] = round(time.perf_counter() - start, 6)
            row["fired"] = log.fired[name] - fired
            reasons = log.declined[declined:]
            row["declined"] = [{"reason": d.reason, "module": d.module, "nodes": list(d.nodes)} for d in reasons]
            row["notices"] = log.notices[notices:]
            self._after(row, gm)

    def _after(self, row: dict[str, Any], gm: GraphModule) -> None:
        row["before"], row["after"] = self.latest, None
        if row["fired"]:
            row["after"] = self.latest = f"{len(self.rows) + 1:02}-{row['pass']}.txt"
            self.texts[self.latest] = graph_text(gm)
        self.rows.append(row)

    def write(self) -> None:
        """Put the files where they belong; a full disk costs the trace, and nothing else."""
        if self.session.failed:
            return
        rows = [row for row in self.rows if row["fired"]] or self.rows
        stages = list(dict.fromkeys(row["stage"] for row in rows))
        try:
            folder = self.session.folder / f"{self.number:02}-{'-'.join(stages)}"
            folder.mkdir()
            for name, text in self.texts.items():
                (folder / name).write_text(f"{text}\n", encoding="utf-8")
            index = {"pipeline": self.number, "seconds": sum(r["seconds"] for r in self.rows), "passes": self.rows}
            (folder / "index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
            with (self.session.folder / "index.md").open("a", encoding="utf-8") as page:
                page.write(_section(folder.name, self.rows))
        except OSError as error:
            self.session.give_up(error)


_current: ContextVar[_Session | None] = ContextVar("trace", default=None)
_of_variable: dict[str, _Session | None] = {}


@contextlib.contextmanager
def trace(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Write what passes do in the body to a new folder in `directory`, the path of which it gives.

    Raises:
        QCompileError: the folder cannot be made. What cannot be written later is a warning, as results matter more.
    """
    try:
        session = _Session(directory)
    except OSError as error:
        raise QCompileError(f"cannot write a trace to {os.fspath(directory)}: {error.strerror}") from error
    token = _current.set(session)
    try:
        yield session.folder
    finally:
        _current.reset(token)


@contextlib.contextmanager
def pipeline_trace(gm: GraphModule) -> Iterator[PipelineTrace | None]:
    """What follows the passes over `gm` in the body; None if nobody asked for it."""
    session = _current.get() or _session_of_variable()
    if session is None or session.failed:
        yield None
        return
    found = PipelineTrace(session, gm)
    try:
        yield found
    finally:
        found.write()


def _session_of_variable() -> _Session | None:
    directory = os.environ.get(VARIABLE)
    if not directory:
        return None
    known = _of_variable.get(directory)
    if directory not in _of_variable or (known is not None and known.process != os.getpid()):  # a child has its own
        try:
            _of_variable[directory] = _Session(directory)
        except OSError as error:
            _of_variable[directory] = None
            logger.warning("%s=%s: no trace is written: %s", VARIABLE, directory, error)
    return _of_variable[directory]


def _new_folder(directory: Path, names: tuple[str, ...]) -> Path:
    """The first of `names` that is not there yet: made here, so that nobody else has it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        with contextlib.suppress(FileExistsError):
            (directory / name).mkdir()
            return directory / name
    raise FileExistsError(f"{directory / names[0]} is there, and {len(names) - 1} more of that name")


def _section(folder: str, rows: list[dict[str, Any]]) -> str:
    """What a page says of a pipeline: the passes that fired, declined or failed."""
    told = [row for row in rows if row["fired"] or row["declined"] or "error" in row]
    table = ["| pass | fired | declined | seconds | after |", "|---|---:|---:|---:|---|"]
    for row in told:
        name = row["after"]
        after = f"[{name}]({folder}/{name})" if name else row.get("error", "unchanged").replace("|", "\\|")
        counts = f"{row['fired']} | {len(row['declined'])} | {row['seconds']:.3f}"
        table.append(f"| {row['pass']} | {counts} | {after} |")
    seconds = sum(row["seconds"] for row in rows)
    told_by_table = table if told else ["Nothing fired."]
    last = f"\n{len(rows)} passes, {seconds:.3f} s; before: {folder}/00-start.txt\n"
    return "\n".join([f"\n## {folder}\n", *told_by_table, last])
