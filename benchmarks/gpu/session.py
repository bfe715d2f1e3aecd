"""Runs cases in order within a budget of time: check first, then time what is right, side by side."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from benchmarks.gpu import gemm, variants
from benchmarks.gpu.candidates import Candidate, Prepared, candidates_of, names_of
from benchmarks.gpu.cases import Case, GemmCase
from benchmarks.gpu.chips import Machine
from benchmarks.gpu.compiler import Compiler, Unavailable
from benchmarks.gpu.results import File
from benchmarks.gpu.rows import Row
from benchmarks.gpu.timing import Clock, Samples, in_turn


@dataclass(frozen=True)
class Plan:
    """How a session measures.

    Attributes:
        seconds: budget of the whole session; a case that has begun is brought to an end with what is ready by then.
        rounds, burst: rounds of the comparison, and seconds that a variant of a model runs for in a round. A product
            has a fifth of them: it is so short that these are many samples.
        chosen: patterns of the names of variants.
    """

    compiler: Compiler = field(default_factory=Compiler)
    seconds: float = 540.0
    rounds: int = 7
    burst: float = 0.25
    chosen: Sequence[str] = ("*",)

    def wants(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.chosen)


class Session:
    """One run of the benchmark."""

    def __init__(self, machine: Machine, plan: Plan, file: File) -> None:
        self.machine, self.plan, self.file = machine, plan, file
        self.clock = Clock(machine)
        self.burst = plan.burst
        self.end = time.monotonic() + plan.seconds
        torch._dynamo.config.recompile_limit = 64  # every variant compiles the same forward
        torch.backends.cuda.matmul.allow_tf32 = False  # the reference is fp32

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @torch.no_grad()
    def run(self, cases: Sequence[Case]) -> None:
        """Measure `cases` in order, those that the file has not got."""
        for case in cases:
            names = [name for name in names_of(case) if self.plan.wants(name)]
            have = [self.file.rows.get((case.name, name)) for name in names]
            if all(row is not None and row.status != "skipped" for row in have):
                continue  # else the case is measured as a whole, or its rows could not be compared
            if self.left <= 0:
                self._skip(case.name, names)
            else:
                self._measure(case)
            self._forget()

    def _measure(self, case: Case) -> None:
        print(f"{case.name}, {self.left:.0f} s left", file=sys.stderr, flush=True)
        try:
            found = candidates_of(case, self.machine, self.plan.compiler)
            candidates = [candidate for candidate in found if self.plan.wants(candidate.name)]
        except Exception as error:  # the other cases go on
            traceback.print_exc()
            self.file.put(Row(case.name, "reference", "failed", _reason(error)))
            return
        self.burst = self.plan.burst / 5 if isinstance(case, GemmCase) else self.plan.burst
        ready: dict[Candidate, Prepared] = {}
        longest = 0.0
        for index, candidate in enumerate(candidates):
            if self.left < longest + (len(ready) + 1) * self.burst * self.plan.rounds and index:
                self._skip(case.name, [left.name for left in candidates[index:]])
                break
            start = time.monotonic()
            self._prepare(case.name, candidate, ready)
            longest = max(longest, time.monotonic() - start)
        self._compare(case.name, ready)

    def _prepare(self, case: str, candidate: Candidate, ready: dict[Candidate, Prepared]) -> None:
        """Put a first row of `candidate`, and it into `ready` if it is right."""
        try:
            prepared = candidate.prepare()
            is_right = not prepared.verdict.faults
            first = Samples([self.clock.burst(prepared.recorded.run, self.burst)] if is_right else [])
        except Unavailable as error:
            self.file.put(Row(case, candidate.name, "unavailable", str(error)))
            return
        except Exception as error:  # whatever a compiler or a kernel raises: the other rows go on
            traceback.print_exc()
            self.file.put(Row(case, candidate.name, "failed", _reason(error)))
            return
        checked: Mapping[str, Any] = {"check": dict(prepared.verdict.numbers), "facts": prepared.facts}
        if not is_right:
            self.file.put(Row(case, candidate.name, "wrong", "; ".join(prepared.verdict.faults), **checked))
            return
        ready[candidate] = prepared
        self.file.put(_timed(case, candidate, prepared, first))

    def _compare(self, case: str, ready: Mapping[Candidate, Prepared]) -> None:
        runs = {candidate.name: prepared.recorded.run for candidate, prepared in ready.items()}
        for samples in in_turn(self.clock, runs, self.plan.rounds, self.burst):
            baseline = samples.get(variants.BASELINE) or samples.get(gemm.BASELINE)
            rows = [_timed(case, c, prepared, samples[c.name], baseline) for c, prepared in ready.items()]
            self.file.put(*rows)
            if self.left <= 0:
                break

    def _skip(self, case: str, names: Sequence[str]) -> None:
        kept = self.file.rows
        missing = [name for name in names if (case, name) not in kept]
        self.file.put(*(Row(case, name, "skipped", "no time was left") for name in missing))

    def _forget(self) -> None:
        """Free what a case held, compiled code and the models in it."""
        torch._dynamo.reset()
        gc.collect()
        if self.machine.device.type == "cuda":
            torch.cuda.empty_cache()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _timed(
    case: str, candidate: Candidate, prepared: Prepared, samples: Samples, baseline: Samples | None = None
) -> Row:
    """A row of times of a right candidate; `baseline`, taken in the same rounds, makes it comparable."""
    low, high = samples.quartiles()
    ms = samples.median / prepared.products
    return Row(
        case,
        candidate.name,
        "ok",
        ms=ms,
        q1=low / prepared.products,
        q3=high / prepared.products,
        samples=len(samples.all),
        interleaved=len(samples.rounds) > 1,
        speedup=samples.over(baseline) if baseline else None,
        check=dict(prepared.verdict.numbers),
        facts=prepared.facts | candidate.facts_of(ms),
    )
