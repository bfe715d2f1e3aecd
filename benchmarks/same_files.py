"""Claim: a change that moves nobody's behaviour makes, bit for bit, the same codes and files.

Each shipped recipe on the models of the benchmarks, once by another commit and once by this checkout: weights, codes
and scales of the program, its ONNX files for both targets (metadata aside), and the checkpoints of every format; where
one of them refuses, the other has to with the same sentence.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cyclopts

from benchmarks import record
from benchmarks.fresh import in_process
from benchmarks.same_files_worker import models
from qcompile import list_recipes

app = cyclopts.App(help=__doc__)

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("same_files_worker.py")
# Between them what the fusion benchmark compiles: packed and separate q, k, v, grouped queries, masks, dynamic shapes,
# experts, two streams, windows.
USUAL = ("vit", "timm", "llama-fp16-dynamic", "bert", "mixtral/static", "flux/static", "swin/static")


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is not the same in both."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def compared(base: Path, model: str, recipes: list[str]) -> list[dict[str, Any]]:
    """A row for each recipe."""
    before, after = (in_process(str(WORKER), str(side), model, *recipes) for side in (base, ROOT))
    rows = []
    for recipe in recipes:
        found = differences(before[recipe], after[recipe])
        rows.append({"model": model, "recipe": recipe, "compared": len(before[recipe]), "differ": found[:5]})
        rows[-1] |= {"of": len(found), "ok": not found}
        print(f"{model}, {recipe}: {len(found)} of {len(before[recipe])} differ", file=sys.stderr, flush=True)
    return rows


@app.default
def main(
    base: str,
    *,
    model: list[str] | None = None,
    recipe: list[str] | None = None,
    every: bool = False,
    jobs: int = 2,
    output: Path | None = None,
) -> int:
    """Compare this checkout with BASE. Exit code 1 if anything differs.

    Parameters
    ----------
    base: a revision of this repository, or the directory of another checkout.
    model: rows of the fusion benchmark or of the coverage table; a choice of seven by default.
    recipe: shipped recipes; all of them by default.
    every: every model, which takes an hour or two.
    jobs: how many processes run at a time.
    output: JSON file, in place of benchmarks/results/same_files.json.
    """
    names = list(models()) if every else list(model or USUAL)
    recipes = recipe or list(list_recipes())
    with tempfile.TemporaryDirectory(prefix="same_files") as folder:
        other = Path(base).resolve()
        if not other.is_dir():
            other = Path(folder) / "base"
            command = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(other), base]
            subprocess.run(command, check=True, capture_output=True)
        try:
            with ThreadPoolExecutor(jobs) as pool:
                rows = [row for rows in pool.map(lambda name: compared(other, name, recipes), names) for row in rows]
        finally:
            if other.is_relative_to(folder):
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(other)], check=True)
    record.show(f"the same codes and files as {base}", [{**r, "differ": ", ".join(r["differ"])} for r in rows])
    print(record.write("same_files", rows, output, base=base, models=names, recipes=recipes))
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(app())
