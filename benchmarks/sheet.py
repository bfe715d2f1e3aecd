"""The rows of a benchmark over `benchmarks.architectures`, each measured in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from benchmarks import record
from benchmarks.architectures import Architecture

LIMIT = 600  # seconds of CPU time for one model

R = TypeVar("R")


def matching(architectures: Sequence[Architecture], only: Sequence[str] | None) -> list[Architecture]:
    """Those whose names are in `only`, or match a glob of it; all for None."""
    return [a for a in architectures if only is None or any(fnmatchcase(a.name, glob) for glob in only)]


class Sheet(Generic[R]):
    """A file of results; rows that are not measured again are kept.

    Args:
        benchmark: what it is called, and the file without another `output`.
        row: makes a row, a dataclass with a `name`, of its fields.
        order: of the rows.
    """

    def __init__(
        self, benchmark: str, row: Callable[..., R], order: Iterable[Architecture], output: Path | None
    ) -> None:
        self.benchmark, self.order = benchmark, [architecture.name for architecture in order]
        self.path = output or record.RESULTS / f"{benchmark}.json"
        results = json.loads(self.path.read_text())["results"] if self.path.exists() else []
        self.by_name = {r["name"]: row(**r) for r in results}

    @property
    def rows(self) -> list[R]:
        return [self.by_name[name] for name in self.order if name in self.by_name]

    def fill(
        self,
        chosen: Sequence[Architecture],
        measure: Callable[[Architecture, str, str], R],
        crashed: Callable[[str, str], R],
        tell: Callable[[R], str],
        *,
        jobs: int,
        recipe: str,
        target: str,
    ) -> None:
        """Measure the `chosen` ones, `jobs` at a time, and write the file after each.

        Args:
            measure: makes a row of an architecture, the name of a recipe, and a target.
            crashed: makes one of a name, and of how its process ended without a row.
            tell: what is printed of a row.
        """

        def measured(architecture: Architecture) -> tuple[str, R]:
            row = _in_child(lambda: measure(architecture, recipe, target))
            return architecture.name, crashed(architecture.name, row) if isinstance(row, str) else row

        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with ThreadPoolExecutor(jobs) as pool:
            for name, row in pool.map(measured, chosen):
                self.by_name[name] = row
                print(tell(row), file=sys.stderr, flush=True)
                rows: list[Any] = self.rows
                record.write(self.benchmark, [asdict(r) for r in rows], self.path, recipe=recipe, target=target)


def _in_child(work: Callable[[], R]) -> R | str:
    """What `work` gives in a forked process, or how that ended: a crash or an endless build costs one row."""
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        writer.send(work())

    child = context.Process(target=limited)
    child.start()
    writer.close()
    try:
        result: R = reader.recv()
        return result
    except EOFError:  # the child ended without a word
        child.join()
        return f"the process ended with exit code {child.exitcode}, within {LIMIT} s of CPU time"
    finally:
        child.join()
