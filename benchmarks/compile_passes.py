"""Claim: the first call of a compiled 12-layer ViT, passes only, takes under 1 s over the trace itself.

`torch.compile(model, backend="qcompile", options={"target": "eager"})` against a back end that traces the same graph in
the same way and returns it as it is. Each first call is in a fresh process, in turn A B A B; the differences are taken
pair by pair. A ViT with the width of DeiT-tiny, and ViT-base, whose 86 million weights are quantized on the way.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

import cyclopts
import torch

from benchmarks import record
from benchmarks.fresh import in_process

BAR = 1.0
SIZES: dict[str, dict[str, int]] = {
    "ViT-tiny": {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3},
    "ViT-base": {},
}

Side = Literal["trace", "qcompile"]
app = cyclopts.App(help=__doc__)


@app.command(name="first-call", show=False)
def first_call(side: Side, size: str, recipe: str) -> None:
    """Print the seconds of one first call in this process; `main` starts it."""
    from transformers import ViTConfig, ViTForImageClassification

    import qcompile
    from qcompile.dynamo.trace import Captured, trace

    def traced(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        trace(Captured.read(gm, example_inputs), [])
        return gm.forward

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES[size])).eval()
    x = torch.randn(1, 3, 224, 224)
    options: dict[str, Any] = {"recipe": recipe, "target": "eager"}
    if recipe == "fp8":
        options["calibration"] = qcompile.calibrate(model, (x,), recipe=recipe, calibration=[x], progress=False)
    if side == "trace":
        compiled = torch.compile(model, backend=traced)
    else:
        compiled = torch.compile(model, backend="qcompile", options=options)
    with torch.no_grad():
        torch.compile(torch.nn.Linear(4, 4), backend="eager")(torch.randn(2, 4))  # Dynamo's own imports
        start = time.perf_counter()
        compiled(x)
        first = time.perf_counter() - start
        start = time.perf_counter()
        compiled(x)
        second = time.perf_counter() - start  # the passes' result runs unfused: it is no part of compiling
    print(json.dumps(first - second))


def run(side: Side, size: str, recipe: str) -> float:
    """Seconds of one first call in a fresh process."""
    return float(in_process("-m", "benchmarks.compile_passes", "first-call", side, size, recipe))


def measure(size: str, pairs: int, recipe: str) -> dict[str, Any]:
    """Medians of both sides, and the median and all of the differences of each pair."""
    trace_s, ours_s = [], []
    for pair in range(pairs):
        trace_s.append(run("trace", size, recipe))
        ours_s.append(run("qcompile", size, recipe))
        print(f"{size}, pair {pair + 1}: {ours_s[-1]:.2f} / {trace_s[-1]:.2f} s", file=sys.stderr, flush=True)
    over = [ours - trace for ours, trace in zip(ours_s, trace_s, strict=True)]
    return {
        "model": size,
        "recipe": recipe,
        "trace s": statistics.median(trace_s),
        "qcompile s": statistics.median(ours_s),
        "over s": statistics.median(over),
        "pairs": " ".join(f"{seconds:.2f}" for seconds in over),
        "bar": f"< {BAR}",
        "ok": statistics.median(over) < BAR,
    }


@app.default
def main(
    *, pairs: int = 5, recipe: Literal["fp8", "fp8_per_channel_per_token"] = "fp8", output: Path | None = None
) -> int:
    """Measure and print both models. Exit code 1 if a bar is missed.

    Parameters
    ----------
    pairs: how many pairs of fresh processes.
    recipe: what quantizes the models.
    output: JSON file, in place of benchmarks/results/compile_passes.json.
    """
    rows = [measure(size, pairs, recipe) for size in SIZES]
    record.show("First call, passes only, over the trace", rows)
    record.write("compile_passes", rows, output, pairs=pairs, recipe=recipe)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(app())
