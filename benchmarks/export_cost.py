"""Claim: from module to verified FP8 file costs at most 1.6 x the time and 1.3 x the memory of a plain export.

ViT-base with random weights. Ours: capture, quantize with four images, export, verify (no numeric comparison). The
rival: `torch.onnx.export(dynamo=True)` of the same unquantized module. Each run is a fresh process, in turn A B A B;
the ratios are taken pair by pair, so that a machine that slows down slows both.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import cyclopts

from benchmarks import record
from benchmarks.fresh import in_process

TIME_BAR, MEMORY_BAR = 1.6, 1.3

app = cyclopts.App(help=__doc__)


def run(side: str, layers: int, dtype: str) -> dict[str, float]:
    """One export in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        measured: dict[str, float] = in_process("-m", "benchmarks.export_worker", side, str(layers), dtype, path)
    return measured


def measure(layers: int, dtype: str, pairs: int) -> dict[str, Any]:
    """Medians of both sides, and the median and range of the ratios of each pair."""
    ours, theirs = [], []
    for pair in range(pairs):
        ours.append(run("qcompile", layers, dtype))
        theirs.append(run("torch", layers, dtype))
        print(
            f"{layers} layers, pair {pair + 1}: {ours[-1]['seconds']:.1f} / {theirs[-1]['seconds']:.1f} s,"
            f" {ours[-1]['peak_mb']:.0f} / {theirs[-1]['peak_mb']:.0f} MB",
            file=sys.stderr,
            flush=True,
        )
    time_ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
    memory_ratios = [a["peak_mb"] / b["peak_mb"] for a, b in zip(ours, theirs, strict=True)]
    return {
        "layers": layers,
        "dtype": dtype,
        "seconds": statistics.median(run["seconds"] for run in ours),
        "torch_seconds": statistics.median(run["seconds"] for run in theirs),
        "time_ratio": statistics.median(time_ratios),
        "peak_mb": statistics.median(run["peak_mb"] for run in ours),
        "torch_peak_mb": statistics.median(run["peak_mb"] for run in theirs),
        "memory_ratio": statistics.median(memory_ratios),
        "time_ratios": time_ratios,
        "memory_ratios": memory_ratios,
        "runs": {"qcompile": ours, "torch": theirs},
        "ok": statistics.median(time_ratios) <= TIME_BAR and statistics.median(memory_ratios) <= MEMORY_BAR,
    }


def cells(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "layers": row["layers"],
        "dtype": row["dtype"],
        "qcompile s": row["seconds"],
        "torch s": row["torch_seconds"],
        "time ratio": row["time_ratio"],
        "pairs": " ".join(f"{ratio:.2f}" for ratio in row["time_ratios"]),
        "qcompile MB": row["peak_mb"],
        "torch MB": row["torch_peak_mb"],
        "memory ratio": row["memory_ratio"],
        "bar": f"<= {TIME_BAR}, <= {MEMORY_BAR}",
        "ok": row["ok"],
    }


@app.default
def main(
    *,
    layers: int = 12,
    pairs: int = 3,
    dtype: Literal["float32", "float16"] = "float32",
    growth: bool = False,
    output: Path | None = None,
) -> int:
    """Measure and print the ratios. Exit code 1 if a bar is missed.

    Parameters
    ----------
    layers: number of blocks.
    pairs: how often each side is run; at least 3 for figures worth reporting.
    dtype: of the module that both sides get.
    growth: also 3, 6 and 24 layers, one pair each, to see how the cost grows; no bar holds there.
    output: JSON file, in place of benchmarks/results/export_cost.json.
    """
    rows = [measure(layers, dtype, pairs)]
    if growth:
        rows += [measure(count, dtype, 1) for count in (3, 6, 24) if count != layers]
    record.show("From module to verified file, against torch.onnx.export", [cells(row) for row in rows])
    record.write("export_cost", rows, output, layers=layers, pairs=pairs, dtype=dtype)
    return int(not rows[0]["ok"])


if __name__ == "__main__":
    sys.exit(app())
