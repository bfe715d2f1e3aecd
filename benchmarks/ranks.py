"""Claim: calibration on two ranks takes each of them at most 0.6 x the CPU time that it takes one process.

`quantize` of a captured transformer of random weights, with batches that take most of the time, in one thread: what
every rank does anew, the passes and the solving of weights, is in it. Runs are fresh processes, one alone and two over
gloo in turn; the ratio is that of the rank that takes longer, and every rank has to have the bits of one process.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cyclopts

from benchmarks import record
from benchmarks.fresh import in_process

BAR = 0.6
RECIPES = ("fp8", "nvfp4")

app = cyclopts.App(help=__doc__)


def run(recipe: str, batches: int, count: int) -> list[dict[str, Any]]:
    """What each of `count` processes measures of itself."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(count) as pool:
        given = (recipe, str(batches), str(count), str(Path(folder) / "store"))
        return list(
            pool.map(lambda rank: in_process("-m", "benchmarks.ranks", "worker", *given, str(rank)), range(count))
        )


def measure(recipe: str, batches: int, pairs: int) -> dict[str, Any]:
    """Medians over pairs of runs."""
    alone, shared, ratios = [], [], []
    for pair in range(pairs):
        (one,), two = run(recipe, batches, 1), run(recipe, batches, 2)
        if any(rank["bits"] != one["bits"] for rank in two):
            raise SystemExit(f"{recipe}: two ranks have other bits than one process")
        alone.append(one["cpu_s"])
        shared.append(max(rank["cpu_s"] for rank in two))
        ratios.append(shared[-1] / alone[-1])
        print(f"{recipe}, pair {pair + 1}: {alone[-1]:.1f} and {shared[-1]:.1f} s", file=sys.stderr, flush=True)
    return {
        "recipe": recipe,
        "batches": batches,
        "cpu_s": statistics.median(alone),
        "cpu_s_of_two": statistics.median(shared),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ok": statistics.median(ratios) <= BAR,
    }


@app.command
def worker(recipe: str, batches: int, count: int, store: str, rank: int) -> None:
    """Quantize as one of `count` ranks."""
    import torch
    from torch import distributed, nn

    import qcompile

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    data = [torch.randn(8, 64, 256) for _ in range(batches)]
    if count > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    captured = torch.export.export(model, (data[0],))
    start = time.process_time()
    program = qcompile.quantize(captured, recipe=recipe, calibration=data, progress=False)
    spent = time.process_time() - start
    found = hashlib.sha256()
    for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
        found.update(name.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    print(json.dumps({"cpu_s": spent, "bits": found.hexdigest()}))


@app.default
def main(*, pairs: int = 5, batches: int = 256, output: Path | None = None) -> int:
    """Measure and print the ratios. Exit code 1 if a bar is missed.

    Parameters
    ----------
    pairs: how often each side is run. batches: of 512 tokens, to calibrate with.
    output: JSON file, in place of benchmarks/results/ranks.json.
    """
    rows = [measure(recipe, batches, pairs) for recipe in RECIPES]
    shown = [
        {
            "recipe": row["recipe"],
            "batches": row["batches"],
            "one process, CPU s": row["cpu_s"],
            "each of two": row["cpu_s_of_two"],
            "ratio": row["ratio"],
            "ok": row["ok"],
        }
        for row in rows
    ]
    record.show("Calibration on two ranks", shown)
    record.write("ranks", rows, output, pairs=pairs, batches=batches)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(app())
