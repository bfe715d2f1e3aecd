"""Claim: `import passes` and `import qcompile` cost at most 0.15 of the CPU time that `import torch` takes.

Fresh processes, in turn torch, ours, torch, ours; user and system time of the whole process, so that the start of the
interpreter is in both. Beside it, with a bar of their own: what the command line takes until it has answered.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import cyclopts

from benchmarks import record
from benchmarks.fresh import in_process

RATIO_BAR, SECONDS_BAR = 1.15, 0.5
_TOLD = "import resource; used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime)"
_IMPORTS = {"torch": "import torch", "qcompile": "import torch, passes, qcompile", "alone": "import passes, qcompile"}
_COMMANDS = ("--help", "recipes list", "recipes show fp8", "recipes check nvfp4", "completion bash")

app = cyclopts.App(help=__doc__)


def seconds(code: str) -> float:
    """CPU seconds of a fresh process that runs `code`."""
    used: float = in_process("-c", f"{code}\n{_TOLD}")
    return used


def imports(runs: int) -> dict[str, Any]:
    """Medians of each import, and of the ratios run by run."""
    taken: dict[str, list[float]] = {name: [] for name in _IMPORTS}
    for _ in range(runs):
        for name, code in _IMPORTS.items():
            taken[name].append(seconds(code))
    ratio = statistics.median(ours / theirs for ours, theirs in zip(taken["qcompile"], taken["torch"], strict=True))
    medians = {f"{name}_seconds": statistics.median(values) for name, values in taken.items()}
    return {**medians, "ratio": ratio, "runs": taken, "ok": ratio <= RATIO_BAR}


def commands(runs: int) -> list[dict[str, Any]]:
    """The CPU time until each command has answered."""
    rows = []
    for command in _COMMANDS:
        code = f"from qcompile.cli import main\nmain({command.split()})"
        taken = [seconds(code) for _ in range(runs)]
        middle = statistics.median(taken)
        rows.append({"command": f"qcompile {command}", "seconds": middle, "runs": taken, "ok": middle < SECONDS_BAR})
    return rows


@app.default
def main(*, runs: int = 7, output: Path | None = None) -> int:
    """Measure and print CPU times. Exit code 1 if a bar is missed.

    Parameters
    ----------
    runs: fresh processes of each kind.
    output: JSON file, in place of benchmarks/results/import_time.json.
    """
    found, answers = imports(runs), commands(runs)
    shown = {f"{name} s": found[f"{name}_seconds"] for name in _IMPORTS}
    record.show("CPU time of imports", [{**shown, "ratio": found["ratio"], "bar": RATIO_BAR, "ok": found["ok"]}])
    record.show(
        "CPU time until the command line has answered",
        [{"command": row["command"], "s": row["seconds"], "bar": SECONDS_BAR, "ok": row["ok"]} for row in answers],
    )
    record.write("import_time", {"imports": found, "commands": answers}, output, runs=runs)
    return int(not (found["ok"] and all(row["ok"] for row in answers)))


if __name__ == "__main__":
    sys.exit(app())
