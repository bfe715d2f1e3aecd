"""Claim: INT8 files of qcompile run in ONNX Runtime at the speed of its own, and at a fraction of float32's time.

An MLP (768 wide, 3072 between, GELU) on 256 rows, one thread, default sessions: in float32, quantized by ONNX
Runtime's `quantize_static` (Q/DQ, per channel, the same samples) and `quantize_dynamic`, and exported by qcompile with
the recipe `int8_fast`; beside them `torch.compile(model, backend="qcompile")`. One run of each in turn, medians.
`error` is the relative one against float32 of a session without optimizations: a default one saturates sums on CPUs
without VNNI.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import qcompile
from benchmarks import record

WIDTH, INNER = 768, 3072
# of the time of each; without VNNI no file of INT8 comes near the first
SLOWEST = {"quantize_static": 1.1, **({"float32": 0.4} if torch.cpu._is_vnni_supported() else {})}

app = cyclopts.App(help=__doc__)


class Samples(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch.numpy()}


def files(model: nn.Module, batches: list[torch.Tensor], folder: Path) -> dict[str, Path]:
    """Name -> file, of each rival and of ours."""
    paths = {name: folder / f"{name}.onnx" for name in ("float32", "quantize_static", "quantize_dynamic", "qcompile")}
    torch.onnx.export(model, (batches[0],), paths["float32"], input_names=["x"], dynamo=True, verbose=False)
    plain = folder / "prepared.onnx"
    quant_pre_process(paths["float32"], plain)  # without it, quantize_dynamic refuses a Gemm of torch's exporter
    quantize_static(
        plain,
        paths["quantize_static"],
        Samples(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
    )
    quantize_dynamic(plain, paths["quantize_dynamic"], per_channel=True, weight_type=QuantType.QInt8)
    program = qcompile.quantize(
        model, (batches[0],), recipe="int8_fast", calibration=batches, dtype=torch.float32, progress=False
    )
    qcompile.export_onnx(program, paths["qcompile"], target="portable", input_names=["x"])
    return paths


def session(path: Path, *, optimized: bool = True) -> Callable[[dict[str, Any]], Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    made = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feeds: made.run(None, feeds)[0]


def compiled(model: nn.Module, batches: list[torch.Tensor]) -> Callable[[dict[str, Any]], Any]:
    state = qcompile.calibrate(model, (batches[0],), recipe="int8_fast", calibration=batches, progress=False)
    run = torch.compile(model, backend="qcompile", options={"recipe": "int8_fast", "calibration": state})
    return lambda feeds: run(torch.from_numpy(feeds["x"])).numpy()


def measure(axes: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each, on inputs of so many axes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)).eval()
    batches = [torch.randn(*[1] * (axes - 2), tokens, WIDTH) for _ in range(8)]
    feeds = {"x": batches[0].numpy()}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        paths = files(model, batches, Path(folder))
        exact = session(paths["float32"])(feeds)
        errors = {name: _error(session(path, optimized=False)(feeds), exact) for name, path in paths.items()}
        runs = {name: session(path) for name, path in paths.items()}
        runs["torch.compile"] = compiled(model, batches)
        errors["torch.compile"] = _error(runs["torch.compile"](feeds), exact)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
        times = _in_turn(runs, feeds, rounds)
    return [
        {
            "axes": axes,
            "file": name,
            "ms": times[name],
            "ratio": times[name] / times["float32"],
            "error": errors[name],
            "bytes": sizes.get(name),
            "ok": name != "qcompile" or all(times[name] <= most * times[rival] for rival, most in SLOWEST.items()),
        }
        for name in runs
    ]


def _error(found: Any, exact: Any) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _in_turn(runs: dict[str, Callable[[Any], Any]], feeds: Any, rounds: int) -> dict[str, float]:
    """Median milliseconds of CPU time, of one thread."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run(feeds)
            found[name].append(1000 * (time.process_time() - start))
    return {name: statistics.median(times) for name, times in found.items()}


@app.default
def main(
    *,
    tokens: int = 256,
    rounds: int = 25,
    output: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> int:
    """Measure on inputs of two and three axes. Exit code 1 if qcompile's file is slower than is claimed.

    Parameters
    ----------
    tokens: rows.
    rounds: runs of each, in turn.
    output: JSON file, in place of benchmarks/results/onnxruntime_int8.json.
    """
    torch.set_num_threads(1)
    rows = [row for axes in (2, 3) for row in measure(axes, tokens, rounds)]
    record.show("INT8 in ONNX Runtime", rows)
    record.write("onnxruntime_int8", rows, output, tokens=tokens, rounds=rounds)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(app())
