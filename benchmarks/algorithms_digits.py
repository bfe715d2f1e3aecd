"""Claim: GPTQ and a low-rank part bring a vision transformer's logits in NVFP4 and FP8 nearer to the float model's.

The demo's vision transformer, trained on digits of scikit-learn, with the recipe nvfp4_fp8_attention. The distance of
its logits on test images, relative to their length, and the share of right answers; medians over draws of the training
images that it is calibrated with.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch import Tensor

import qcompile
from benchmarks import record
from qcompile.demo.measure import accuracy
from qcompile.demo.model import Digits, DigitViT, load_digits, train

RECIPE = "nvfp4_fp8_attention"
CASES: dict[tuple[str, ...], float | None] = {
    ("algorithm: max",): None,
    ("algorithm: mse, smallest_range: 1",): None,
    ("algorithm: hessian_mse",): None,
    ("algorithm: gptq",): 0.06,
    ("algorithm: smoothquant", "algorithm: hessian_mse"): None,
    ("algorithm: awq",): None,
    ("algorithm: svdquant",): 0.035,
    ("algorithm: svdquant", "algorithm: mse, smallest_range: 1"): None,
    ("algorithm: svdquant", "algorithm: gptq"): 0.035,
}
"""Steps of calibration -> the most that is claimed of the relative error of the logits."""

app = cyclopts.App(help=__doc__)


def measure(model: DigitViT, digits: Digits, steps: Sequence[str], calibration: Sequence[Tensor]) -> dict[str, float]:
    recipe = qcompile.load_recipe(RECIPE, [f"calibration=[{', '.join(f'{{{step}}}' for step in steps)}]"])
    start = time.process_time()
    program = qcompile.quantize(
        model,
        (digits.images[:2],),
        recipe=recipe,
        calibration=list(calibration),
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        progress=False,
    )
    seconds = time.process_time() - start
    with torch.no_grad():
        found, reference = program.module()(digits.test_images), model(digits.test_images)
    row = accuracy(found, digits.test_labels, reference)
    return {"error": row.error, "top1": row.top1, "cpu_s": seconds}


@app.default
def main(*, draws: int = 3, calibration: int = 128, epochs: int = 30, output: Path | None = None) -> int:
    """Compare algorithms. Exit code 1 if one is beyond its bar.

    Parameters
    ----------
    draws: of calibration images; no two share one. calibration: number of images. epochs: of training.
    output: JSON file, in place of benchmarks/results/algorithms_digits.json.
    """
    digits = load_digits()
    model = train(digits, epochs)
    samples = digits.images[: draws * calibration].split(calibration)
    rows: list[dict[str, Any]] = []
    for steps, most in CASES.items():
        name = " + ".join(step.removeprefix("algorithm: ") for step in steps)
        found = [measure(model, digits, steps, images.split(32)) for images in samples]
        medians: dict[str, Any] = {key: statistics.median(row[key] for row in found) for key in found[0]}
        bar = {"bar": most and f"<= {most}", "ok": None if most is None else medians["error"] <= most}
        rows.append({"steps": name, **medians, **bar})
        print(rows[-1], flush=True)
    record.show(f"digits, {RECIPE}: error of the logits", rows)
    record.write("algorithms_digits", rows, output, draws=draws, calibration=calibration, epochs=epochs)
    return int(any(row["ok"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(app())
