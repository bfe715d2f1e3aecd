"""Claim: SmoothQuant, AWQ and SVDQuant are as near to fp32 as Model Optimizer's, in at most half of its CPU time.

MiniLM with its real weights; both tools quantize the same linear layers with the same samples of calibration, and are
judged on sentences that neither saw. Model Optimizer's presets also quantize what LayerNorms read, which is switched
off here. Its NVFP4 rounds on a GPU alone, so here it rounds with our function, which has the same numbers. 1 - cosine
x 1000 of the pooled embeddings; CPU seconds from the model to the quantized one.

Model Optimizer fits AWQ's factors for each layer, and its export averages those of q, k and v. Ours are shared, or with
`separate: true` not; each is compared with its like.
"""

from __future__ import annotations

import copy
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
import torch

import qcompile
from benchmarks import record
from benchmarks.accuracy_minilm import Batch, Embedder, compare, embed, tokenize
from benchmarks.sentences import sentences
from qcompile.algorithms.simulate import rounded
from qcompile.recipe import QuantizerConfig

CASES = {
    "{algorithm: smoothquant}": ("int8", "INT8_SMOOTHQUANT_CFG"),
    "{algorithm: awq}": ("nvfp4", "NVFP4_AWQ_LITE_CFG"),
    "{algorithm: awq, separate: true}": ("nvfp4", "NVFP4_AWQ_LITE_CFG"),
    "{algorithm: svdquant}": ("nvfp4", "NVFP4_SVDQUANT_DEFAULT_CFG"),
    "{algorithm: svdquant}, {algorithm: gptq}": ("nvfp4", "NVFP4_SVDQUANT_DEFAULT_CFG"),
}
"""Our steps of calibration -> the recipe that it stands in, and Model Optimizer's preset."""

SHARED = {"{algorithm: awq}"}
"""Where Model Optimizer's q, k and v are given one factor, as it does when it exports them."""

_NEAR, _TIME = 1.03, 0.5
app = cyclopts.App(help=__doc__)


def ours(model: Embedder, calibration: Sequence[Batch], steps: str, recipe: str) -> Callable[[Batch], Any]:
    free = torch.export.Dim.DYNAMIC
    program = qcompile.quantize(
        model,
        (),
        calibration[0],
        recipe=qcompile.load_recipe(recipe, [f"calibration=[{steps}]"]),
        calibration=list(calibration),
        dynamic_shapes={name: {0: free, 1: free} for name in calibration[0]},
        dtype=torch.float32,
        progress=False,
    )
    module = program.module()
    return lambda batch: module(**batch).numpy()


def theirs(model: Embedder, calibration: Sequence[Batch], preset: str, shared: bool) -> Callable[[Batch], Any]:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion
    from modelopt.torch.quantization import tensor_quant

    tensor_quant.dynamic_block_quantize_op = _nvfp4
    config = copy.deepcopy(getattr(mtq, preset))
    config["quant_cfg"] += [{"quantizer_name": f"*{name}*", "enable": False} for name in ("LayerNorm", "pooler")]
    quantized = mtq.quantize(  # type: ignore[attr-defined]
        copy.deepcopy(model), config, lambda m: [m(**batch) for batch in calibration]
    )
    for layer in quantized.bert.encoder.layer if shared else ():
        own = layer.attention.self
        preprocess_linear_fusion([own.query, own.key, own.value])
    return lambda batch: quantized(**batch).numpy()


def _nvfp4(x: torch.Tensor, block: int, amax: torch.Tensor, *_: object) -> torch.Tensor:
    return rounded(x.float(), QuantizerConfig("nvfp4", "per_block", (1, block), dynamic=True), amax.amax()).to(x.dtype)


def measure(steps: str, calibration: Sequence[Batch], evaluation: Sequence[Batch]) -> dict[str, Any]:
    model, (recipe, preset) = Embedder().eval(), CASES[steps]
    reference = embed(lambda batch: model(**batch).numpy(), evaluation)
    row: dict[str, Any] = {"steps": re.sub(r"[{}]|algorithm: ", "", steps).replace(", ", " + "), "recipe": recipe}
    make = {
        "": lambda: ours(model, calibration, steps, recipe),
        "modelopt_": lambda: theirs(model, calibration, preset, steps in SHARED),
    }
    for name, quantize in make.items():
        start = time.process_time()
        with torch.no_grad():
            run = quantize()
        seconds = time.process_time() - start
        mean = compare(reference, np.asarray(embed(run, evaluation)))["mean"]
        row |= {f"{name}distance": (1 - mean) * 1000, f"{name}cpu_s": seconds}
    near = row["distance"] <= _NEAR * row["modelopt_distance"]
    return row | {"bar": f"<= {_NEAR} x, <= {_TIME} x s", "ok": near and row["cpu_s"] <= _TIME * row["modelopt_cpu_s"]}


@app.default
def main(*, match: str = "", calibration: int = 64, evaluation: int = 120, output: Path | None = None) -> int:
    """Compare the two tools. Exit code 1 if we are further away, or take longer.

    Parameters
    ----------
    match: a regular expression; only steps that it is found in.
    calibration, evaluation: number of sentences.
    output: JSON file, in place of benchmarks/results/smoothing_modelopt.json.
    """
    calibrating, evaluating = (tokenize(texts) for texts in sentences(calibration, evaluation))
    rows = [measure(steps, calibrating, evaluating) for steps in CASES if re.search(match, steps)]
    record.show("MiniLM-L6: 1 - cosine x 1000 against fp32, and CPU seconds", rows)
    record.write("smoothing_modelopt", rows, output, calibration=calibration, evaluation=evaluation)
    return int(any(row["ok"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(app())
