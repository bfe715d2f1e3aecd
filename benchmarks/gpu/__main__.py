"""Latency and memory of quantized models on one NVIDIA GPU, and the rates of bare matrix products.

Every model runs as bf16 (eager and compiled), in FP8 by torchao if it is installed, and by qcompile in FP8 per tensor,
per row and in blocks (NVFP4, too, where the chip has it). Everything but eager bf16 is a CUDA graph. What a variant
computes is checked first; one that is wrong is reported as wrong and not timed. Variants of a case are timed in turn.

examples:
  python -m benchmarks.gpu                                        what fits into 9 minutes, most important first
  python -m benchmarks.gpu --resume                               what is missing in the file of an earlier run
  python -m benchmarks.gpu --only 'vit-large/*' 'gemm/vit-large*' some cases
  python -m benchmarks.gpu --only 'llama-8b/*' --variants 'bf16-*' 'qcompile-row'
  python -m benchmarks.gpu --tiny                                 every step on a CPU with tiny sizes, no rates
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from benchmarks.gpu.candidates import names_of
from benchmarks.gpu.cases import Case, GemmCase, all_cases, tiny_cases
from benchmarks.gpu.chips import Machine
from benchmarks.gpu.compiler import Compiler
from benchmarks.gpu.results import File
from benchmarks.gpu.rows import bars
from benchmarks.gpu.session import Plan, Session
from benchmarks.gpu.table import show

RESULTS = Path(__file__).parents[1] / "results"


def parser() -> argparse.ArgumentParser:
    """argparse: a machine with a GPU has it."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--only", nargs="+", default=["*"], metavar="CASE", help="names of cases; * matches anything")
    add("--variants", nargs="+", default=["*"], metavar="VARIANT", help="names of variants; * matches anything")
    add(
        "--list",
        action="store_true",
        help="print the cases in the order that they run in, and their variants",
    )
    add("--minutes", type=float, default=9.0, help="stop starting new measurements after so long (default: 9)")
    add(
        "--layers",
        type=int,
        default=4,
        help="layers of the Llama stack and blocks of the DiT; the report also divides by it (default: 4)",
    )
    add("--past", type=int, default=1024, help="tokens in the key/value cache of a decoding step (default: 1024)")
    add("--rounds", type=int, default=7, help="rounds in which the variants of a case take turns (default: 7)")
    add("--burst", type=float, default=0.25, help="seconds that a variant runs for in a round (default: 0.25)")
    add(
        "--autotune",
        action="store_true",
        help="let Inductor time its choices (max-autotune), for every compiled variant; minutes for each case",
    )
    add("--resume", action="store_true", help="keep the rows of the output file and measure those that it lacks")
    add("--output", type=Path, help="JSON file, in place of benchmarks/results/gpu_<chip>.json")
    add("--commit", help="commit of qcompile to note, where git cannot tell")
    add(
        "--tiny", action="store_true", help="tiny models on the CPU: shows that everything runs; the times mean nothing"
    )
    add(
        "--no-inductor",
        action="store_true",
        help="with --tiny: run compiled graphs operator by operator, which takes seconds",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a row is wrong or failed or a bar is missed, 2 if there is nothing to measure or to measure on."""
    options = parser().parse_args(arguments)
    cases = tiny_cases() if options.tiny else all_cases(options.layers, options.past)
    cases = [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in options.only)]
    if options.list:
        print_list(cases)
        return 0
    if not cases:
        print(f"no case is called {' or '.join(options.only)}; --list names them", file=sys.stderr)
        return 2
    if not options.tiny and not torch.cuda.is_available():
        print("torch finds no GPU here. --tiny runs every step on the CPU, with tiny sizes.", file=sys.stderr)
        return 2
    machine = Machine.of(torch.device("cpu" if options.tiny else "cuda"))
    if options.tiny:
        print("tiny models on a CPU: no CUDA graphs, no rates; the times mean nothing", file=sys.stderr)
    plan = Plan(
        Compiler(inductor=not options.no_inductor, autotune=options.autotune),
        options.minutes * 60,
        rounds=2 if options.tiny else options.rounds,
        burst=0.0 if options.tiny else options.burst,
        chosen=options.variants,
    )
    settings = {name: value for name, value in vars(options).items() if name not in ("output", "list", "commit")}
    default = Path(tempfile.gettempdir()) if options.tiny else RESULTS
    file = File(options.output or default / f"gpu_{machine.label}.json", machine, settings, options.commit)
    if options.resume:
        file.resume()
    Session(machine, plan, file).run(cases)
    return report(file)


def print_list(cases: Sequence[Case]) -> None:
    """The cases in their order, then the variants that there are of each kind."""
    for case in cases:
        print(case.name)
    variants = {names: isinstance(case, GemmCase) for case in cases for names in [", ".join(names_of(case))]}
    for names, is_product in variants.items():
        print(f"variants of {'products' if is_product else 'models'}: {names}")


def report(file: File) -> int:
    """Print the table and the bars; the exit code."""
    rows = list(file.rows.values())
    show(f"{file.machine.chip or 'CPU'}, torch {torch.__version__}", [row.cells() for row in rows])
    judged = bars(rows, file.machine.chip)
    for text, ok in judged:
        print("reached" if ok else "MISSED ", text)
    print(f"written to {os.path.relpath(file.path)}")
    return int(any(row.status in ("wrong", "failed") for row in rows) or not all(ok for _, ok in judged))


if __name__ == "__main__":
    sys.exit(main())
