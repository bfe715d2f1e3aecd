"""One measured export, in a process of its own so that its peak memory is its own; export_cost.py starts these.

`python -m benchmarks.export_worker {qcompile,torch} {vit,resnet50} LAYERS DTYPE OUTPUT` prints one line of JSON. With
QCOMPILE_PROFILE set to a path it also writes a cProfile there, and the seconds are then larger than they are.
"""

from __future__ import annotations

import cProfile
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

# What both sides import, before the clock starts: the claim is about exporting, not about importing.
import onnxscript.optimizer  # noqa: F401
import torch

import qcompile
from benchmarks import convnets, models
from benchmarks.models import Example


def peak_mb() -> float:
    """Largest resident size of this process so far. Linux counts in kB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def with_qcompile(example: Example, path: Path) -> dict[str, float]:
    """Capture, quantize with four images, export and verify; seconds of the two calls."""
    start, cpu = time.perf_counter(), time.process_time()
    recipe = qcompile.load_recipe("fp8", ["convolutions=all"])  # the most that there is to do
    program = qcompile.quantize(
        example.model, example.args, recipe=recipe, calibration=example.calibration, progress=False
    )
    quantized, quantize_cpu = time.perf_counter(), time.process_time() - cpu
    after_quantize = peak_mb()
    report = qcompile.export_onnx(program, path)
    end = time.perf_counter()
    assert report.checks and all(check.passed for check in report.checks)
    return {
        "seconds": end - start,
        "quantize_s": quantized - start,
        "quantize_cpu_s": quantize_cpu,
        "export_s": end - quantized,
        "quantize_peak_mb": after_quantize,
    }


def with_torch(example: Example, path: Path) -> dict[str, float]:
    """The unquantized model, by torch alone and without any check of the file."""
    start = time.perf_counter()
    torch.onnx.export(example.model, example.args, path, dynamo=True, verbose=False)
    return {"seconds": time.perf_counter() - start}


def example_of(model: str, layers: int) -> Example:
    """ViT-base of so many blocks, or ResNet-50, which has its own number; on four images."""
    if model == "vit":
        return models.vit(models.with_layers(models.VIT_BASE, layers))
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    return Example(models.random_model(convnets.resnet50), (images[:1],), {}, [images])


def main(side: str, model: str, layers: str, dtype: str, output: str) -> None:
    if model == "resnet50":  # whose CPU time is compared: threads that wait for each other count twice
        torch.set_num_threads(1)
    example = example_of(model, int(layers))
    wanted = getattr(torch, dtype)
    example.model.to(wanted)
    example.args = tuple(value.to(wanted) for value in example.args)
    example.calibration = [batch.to(wanted) for batch in example.calibration]
    run: Callable[[Example, Path], dict[str, float]] = with_qcompile if side == "qcompile" else with_torch
    before = peak_mb()
    start = time.process_time()
    profile = cProfile.Profile(time.process_time) if "QCOMPILE_PROFILE" in os.environ else None
    measured = profile.runcall(run, example, Path(output)) if profile else run(example, Path(output))
    cpu, peak = time.process_time() - start, peak_mb()
    if profile:
        profile.dump_stats(os.environ["QCOMPILE_PROFILE"])
    size = sum(file.stat().st_size for file in Path(output).parent.iterdir())
    print(json.dumps({**measured, "cpu_s": cpu, "before_mb": before, "peak_mb": peak, "file_mb": size / 1e6}))


if __name__ == "__main__":
    main(*sys.argv[1:6])
