"""Claim: GPTQ is as near to fp32 as llm-compressor's, in at most half of its CPU time.

MiniLM with its real weights, same samples of calibration, same format, same damping; text of two kinds that neither
saw, and that calibration is not of. 1 - cosine x 1000 of the pooled embeddings, medians over draws of the calibration
sentences. CPU seconds of llm-compressor are from the model to the quantized one, ours from the captured program, and
the capture stands beside them: the other tool has none, and so nothing that could be exported. `scales: max` is the
paper's algorithm, as llm-compressor has it; our default searches the scales, too.

llm-compressor is no dependency: `pip install llmcompressor` in an environment of its own (it pins transformers).
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cyclopts
import torch

from benchmarks import record
from benchmarks.accuracy_minilm import Batch, compare, embed
from benchmarks.algorithms_minilm import Case, Judge, draw

CASES = {
    "W4A16": ("int4_weight_only", ("algorithm: gptq, scales: max, order: activation", "algorithm: gptq")),
    "NVFP4A16": ("nvfp4_weight_only", ("algorithm: gptq, scales: max", "algorithm: gptq")),
}
"""A scheme of llm-compressor, our recipe that is the same format, and our steps."""

_NEAR, _TIME = 1.03, 0.5
app = cyclopts.App(help=__doc__)


def theirs(judge: Judge, calibration: Sequence[Batch], scheme: str) -> dict[str, float]:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model = copy.deepcopy(judge.model)
    modifier = GPTQModifier(targets="Linear", ignore=["re:.*pooler.*"], scheme=scheme, dampening_frac=0.01)
    data = torch.utils.data.DataLoader(calibration, batch_size=None)  # type: ignore[arg-type]
    start = time.process_time()
    oneshot(model=model.bert, recipe=modifier, dataset=data, pipeline="basic", num_calibration_samples=len(calibration))
    seconds, row = time.process_time() - start, {}
    for kind, batches in judge.texts.items():
        found = compare(judge.reference[kind], embed(lambda batch: model(**batch).numpy(), batches))
        row[kind] = (1 - found["mean"]) * 1000
    return row | {"cpu_s": seconds}


def capture_seconds(judge: Judge) -> float:
    example = judge.texts["docs"][0]
    free = torch.export.Dim.DYNAMIC
    start = time.process_time()
    torch.export.export(judge.model, (), example, dynamic_shapes={name: {0: free, 1: free} for name in example})
    return time.process_time() - start


def medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in found) for key in found[0]}


def rows_of(judge: Judge, scheme: str, samples: Sequence[Sequence[Batch]], captured: float) -> list[dict[str, Any]]:
    """Theirs first, then ours with each of the steps."""
    recipe, choices = CASES[scheme]
    rival = medians([theirs(judge, batches, scheme) for batches in samples])
    rows: list[dict[str, Any]] = [{"scheme": scheme, "what": "llm-compressor", **rival, "capture_s": None, "ok": None}]
    for steps in choices:
        case = Case(recipe, (steps,))
        every = medians([judge.measure(case, batches) for batches in samples])
        row = {"scheme": scheme, "what": f"{recipe}, {case.name}"} | {key: every[key] for key in rival}
        near = all(row[kind] <= _NEAR * rival[kind] for kind in judge.texts)
        rows.append(row | {"capture_s": captured, "ok": near and row["cpu_s"] <= _TIME * rival["cpu_s"]})
    return rows


@app.default
def main(*, draws: int = 3, calibration: int = 64, evaluation: int = 120, output: Path | None = None) -> int:
    """Compare the two tools. Exit code 1 if we are more than 3 % further away, or take more than half of the time.

    Parameters
    ----------
    draws: of calibration sentences. calibration, evaluation: number of sentences.
    output: JSON file, in place of benchmarks/results/rivals_gptq.json.
    """
    judge, samples = Judge.make(evaluation), [draw(calibration, number) for number in range(draws)]
    captured = capture_seconds(judge)
    rows = [row for scheme in CASES for row in rows_of(judge, scheme, samples, captured)]
    record.show("MiniLM-L6, GPTQ: 1 - cosine x 1000 against fp32, and CPU seconds", rows)
    record.write("rivals_gptq", rows, output, draws=draws, calibration=calibration, evaluation=evaluation)
    return int(any(row["ok"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(app())
