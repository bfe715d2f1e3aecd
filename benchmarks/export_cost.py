"""Claim: from module to verified FP8 file costs little more time and memory than a plain export.

ViT-base: at most 1.6 x the time and 1.3 x the memory; ResNet-50 in half precision: 1.2 x the CPU time and memory. Both
have random weights. Ours: capture, quantize with four images, export, verify (no numeric comparison). The rival:
`torch.onnx.export(dynamo=True)` of the same unquantized module. Each run is a fresh process, in turn A B A B; ratios
are taken pair by pair, so that a machine that slows down slows both.
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

BARS = {"vit": ("time_ratio", 1.6, 1.3), "resnet50": ("cpu_ratio", 1.2, 1.2)}  # which time counts, and the two bars

app = cyclopts.App(help=__doc__)


def run(side: str, model: str, layers: int, dtype: str) -> dict[str, float]:
    """One export in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        measured: dict[str, float] = in_process("-m", "benchmarks.export_worker", side, model, str(layers), dtype, path)
    return measured


def measure(model: str, layers: int, dtype: str, pairs: int) -> dict[str, Any]:
    """Medians of both sides, and the median and range of the ratios of each pair."""
    ours, theirs = [], []
    for pair in range(pairs):
        ours.append(run("qcompile", model, layers, dtype))
        theirs.append(run("torch", model, layers, dtype))
        print(
            f"{model}, {layers} layers, pair {pair + 1}: {ours[-1]['seconds']:.1f} / {theirs[-1]['seconds']:.1f} s,"
            f" {ours[-1]['peak_mb']:.0f} / {theirs[-1]['peak_mb']:.0f} MB",
            file=sys.stderr,
            flush=True,
        )
    time_ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True)]
    cpu_ratios = [a["cpu_s"] / b["cpu_s"] for a, b in zip(ours, theirs, strict=True)]
    memory_ratios = [a["peak_mb"] / b["peak_mb"] for a, b in zip(ours, theirs, strict=True)]
    found: dict[str, Any] = {
        "model": model,
        "layers": layers,
        "dtype": dtype,
        "seconds": statistics.median(run["seconds"] for run in ours),
        "torch_seconds": statistics.median(run["seconds"] for run in theirs),
        "time_ratio": statistics.median(time_ratios),
        "cpu_ratio": statistics.median(cpu_ratios),
        "peak_mb": statistics.median(run["peak_mb"] for run in ours),
        "torch_peak_mb": statistics.median(run["peak_mb"] for run in theirs),
        "memory_ratio": statistics.median(memory_ratios),
        "time_ratios": time_ratios,
        "cpu_ratios": cpu_ratios,
        "memory_ratios": memory_ratios,
        "runs": {"qcompile": ours, "torch": theirs},
    }
    time, most, most_memory = BARS[model]
    return {**found, "ok": found[time] <= most and found["memory_ratio"] <= most_memory}


def cells(row: dict[str, Any]) -> dict[str, Any]:
    time, most, most_memory = BARS[row["model"]]
    return {
        "model": row["model"],
        "layers": row["layers"],
        "dtype": row["dtype"],
        "qcompile s": row["seconds"],
        "torch s": row["torch_seconds"],
        "time ratio": row["time_ratio"],
        "CPU ratio": row["cpu_ratio"],
        "pairs": " ".join(f"{ratio:.2f}" for ratio in row["time_ratios"]),
        "qcompile MB": row["peak_mb"],
        "torch MB": row["torch_peak_mb"],
        "memory ratio": row["memory_ratio"],
        "bar": f"{time} <= {most}, memory <= {most_memory}",
        "ok": row["ok"],
    }


@app.default
def main(
    *,
    model: Literal["vit", "resnet50"] = "vit",
    layers: int = 12,
    pairs: int = 3,
    dtype: Literal["float32", "float16"] = "float32",
    growth: bool = False,
    output: Path | None = None,
) -> int:
    """Measure and print the ratios. Exit code 1 if a bar is missed.

    Parameters
    ----------
    model: which one; ResNet-50 is measured in float16, whatever `dtype` says.
    layers: number of blocks, of the ViT.
    pairs: how often each side is run; at least 3 for figures worth reporting.
    dtype: of the module that both sides get.
    growth: also 3, 6 and 24 layers, one pair each, to see how the cost grows; no bar holds there.
    output: JSON file, in place of benchmarks/results/export_cost.json, or export_cost_resnet50.json.
    """
    is_vit = model == "vit"
    layers, dtype = (layers, dtype) if is_vit else (0, "float16")
    rows = [measure(model, layers, dtype, pairs)]
    if growth and is_vit:
        rows += [measure(model, count, dtype, 1) for count in (3, 6, 24) if count != layers]
    record.show("From module to verified file, against torch.onnx.export", [cells(row) for row in rows])
    name = "export_cost" if is_vit else f"export_cost_{model}"
    record.write(name, rows, output, model=model, layers=layers, pairs=pairs, dtype=dtype)
    return int(not rows[0]["ok"])


if __name__ == "__main__":
    sys.exit(app())
