"""Both kinds of case in the form that a session works with: something to prepare, and facts for its row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.gpu import gemm, variants
from benchmarks.gpu.cases import Case, GemmCase, ModelCase
from benchmarks.gpu.check import Verdict
from benchmarks.gpu.chips import Machine
from benchmarks.gpu.compiler import Compiler
from benchmarks.gpu.reference import Reference
from benchmarks.gpu.timing import Recorded, record


@dataclass
class Prepared:
    """What a candidate is timed by: `products` is how many times a run does it, `facts` what its row says besides."""

    recorded: Recorded
    verdict: Verdict
    facts: dict[str, Any]
    products: int = 1


@dataclass(frozen=True)
class Candidate:
    """A variant of a case. `facts_of` turns its median time in milliseconds into what its row also says."""

    name: str
    prepare: Callable[[], Prepared]
    facts_of: Callable[[float], dict[str, Any]]


def names_of(case: Case) -> list[str]:
    """The variants that there are of a case."""
    return [variant.name for variant in (gemm.VARIANTS if isinstance(case, GemmCase) else variants.VARIANTS)]


def model_candidates(case: ModelCase, machine: Machine, compiler: Compiler) -> list[Candidate]:
    """Every variant of a model."""
    reference = Reference(case, machine)

    def prepare(variant: variants.Variant) -> Prepared:
        ready = variants.make_ready(variant, reference, compiler)
        facts = {"seconds_to_first": round(ready.seconds, 1)}
        for name, size in (("peak_mb", ready.peak_bytes), ("kept_mb", ready.kept_bytes)):
            facts |= {name: round(size / 1e6, 1)} if size is not None else {}
        return Prepared(ready.recorded, ready.verdict, facts)

    def facts_of(ms: float) -> dict[str, Any]:
        return {"layers": case.layers, "ms_per_layer": ms / case.layers} if case.layers else {}

    return [Candidate(variant.name, partial(prepare, variant), facts_of) for variant in variants.VARIANTS]


def gemm_candidates(case: GemmCase, machine: Machine, compiler: Compiler) -> Iterator[Candidate]:
    """Every way to multiply one shape."""
    shape = case.gemm
    problem = gemm.Problem(shape, machine)

    def prepare(variant: gemm.GemmVariant) -> Prepared:
        call = gemm.prepare(variant, problem, compiler)
        recorded = record(call, machine)
        verdict = problem.judge(recorded.fresh_outputs()[0], variant.scheme)
        facts = {"m": shape.m, "n": shape.n, "k": shape.k, "kind": variant.kind, "quantizes": not variant.bare}
        return Prepared(recorded, verdict, facts, problem.copies)

    def facts_of(kind: str, ms: float) -> dict[str, Any]:
        floor = shape.floor_seconds(kind, machine.peak) if machine.peak else None
        rates = {"tflops": shape.flops / ms / 1e9}
        return rates | ({"roofline_ms": floor * 1e3, "of_roofline": floor * 1e3 / ms} if floor else {})

    for variant in gemm.VARIANTS:
        yield Candidate(variant.name, partial(prepare, variant), partial(facts_of, variant.kind))


def candidates_of(case: Case, machine: Machine, compiler: Compiler) -> list[Candidate]:
    """Every variant of `case`, none of them prepared; the operands or the reference are made."""
    if isinstance(case, GemmCase):
        return list(gemm_candidates(case, machine, compiler))
    return model_candidates(case, machine, compiler)
