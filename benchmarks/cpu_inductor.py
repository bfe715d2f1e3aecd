"""Claim: on a CPU a quantized model through Inductor is no slower than the model in float32 through plain Inductor.

And its quantized layers take half the memory or less. ViT-base (random weights, 224 pixels) and MiniLM-L6 (real ones),
each recipe through `torch.compile(model, backend="qcompile")` beside `torch.compile(model)`, one call of each in turn,
medians. `difference` is the largest one between the compiled and the uncompiled quantized program, in parts of the
largest output, and `quantization` that between the latter and the float model: where activations are rounded, one that
lies between two codes goes either way after sums in another order, and every layer behind it rounds something else.
Scales are those of `max`, whatever the recipe has: times do not depend on them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch import Tensor

import qcompile
from benchmarks import record
from benchmarks.fast import of_max
from benchmarks.models import MINILM, MINILM_TINY, VIT_BASE, VIT_TINY, Size, load_minilm, vit
from qcompile.recipe import load_recipe

RECIPES = (
    "int8",
    "fp8",
    "fp8_gemm",
    "fp8_per_channel_per_token",
    "fp8_block",
    "nvfp4",
    "nvfp4_weight_only",
)
SLOWEST = 1.0  # of the time of plain Inductor
LARGEST = 0.5  # of the bytes of the quantized layers in float32

app = cyclopts.App(help=__doc__)


@dataclass(frozen=True)
class Case:
    """A model with one input, as keyword arguments."""

    name: str
    model: torch.nn.Module
    inputs: dict[str, Tensor]


def cases(tiny: bool, names: Sequence[str] | None) -> list[Case]:
    """ViT with 1 and 8 images; MiniLM with 1 and 8 sentences of 128 tokens, and one of 16."""
    found = []
    if names is None or "vit" in names:
        size = VIT_TINY if tiny else VIT_BASE
        model = vit(size).model
        for batch in (2,) if tiny else (1, 8):
            found.append(Case(f"ViT, {batch} x {size.tokens} pixels", model, {"pixel_values": _pixels(batch, size)}))
    if names is None or "minilm" in names:
        model = load_minilm()
        size = MINILM_TINY if tiny else MINILM
        model.encoder.layer = model.encoder.layer[: size.layers]
        for batch, tokens in ((2, 8),) if tiny else ((1, 16), (1, 128), (8, 128)):
            found.append(Case(f"MiniLM, {batch} x {tokens} tokens", model, _tokens(batch, tokens, size)))
    return found


def _pixels(batch: int, size: Size) -> Tensor:
    return torch.randn(batch, 3, size.tokens, size.tokens, generator=torch.Generator().manual_seed(1))


def _tokens(batch: int, tokens: int, size: Size) -> dict[str, Tensor]:
    ids = torch.randint(0, size.vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def measure(case: Case, recipes: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each recipe."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # one program of each recipe
    plain = torch.compile(case.model)
    runs: dict[str, Callable[[], Any]] = {"": lambda: plain(**case.inputs)}
    rows = {}
    with torch.no_grad():
        exact = _first(runs[""]())
        for recipe in recipes:
            chosen = of_max(recipe)  # what is compiled has ranges and no data; the reference has both
            calibrated = qcompile.calibrate(case.model, (), case.inputs, recipe=chosen, calibration=[case.inputs])
            options: Any = {"recipe": chosen, "calibration": calibrated}
            compiled = torch.compile(case.model, backend="qcompile", options=options)
            got = _first(compiled(**case.inputs))
            want = _reference(case, recipe)
            rows[recipe] = {
                "difference": _distance(got, want),
                "quantization": _distance(want, exact),
                **_bytes(case.model, compiled),
            }
            runs[recipe] = lambda compiled=compiled: compiled(**case.inputs)  # type: ignore[misc]
        times = _in_turn(runs, rounds)
    return [_row(case.name, recipe, times, rows[recipe]) for recipe in recipes]


def _row(model: str, recipe: str, times: dict[str, float], values: dict[str, float]) -> dict[str, Any]:
    ratio = times[recipe] / times[""]
    return {
        "model": model,
        "recipe": recipe,
        "plain_ms": times[""],
        "qcompile_ms": times[recipe],
        "ratio": ratio,
        **values,
        "ok": ratio <= SLOWEST and values["layer_bytes"] <= LARGEST,
    }


def _reference(case: Case, recipe: str) -> Tensor:
    """What the quantized program computes when it is not compiled."""
    program = qcompile.quantize(
        case.model,
        (),
        case.inputs,
        recipe=of_max(recipe),
        calibration=[case.inputs],
        dtype=torch.float32,
        progress=False,
    )
    return _first(program.module()(**case.inputs))


def _first(result: Any) -> Tensor:
    tensor: Tensor = torch.utils._pytree.tree_leaves(result)[0]
    return tensor.clone()


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def _bytes(model: torch.nn.Module, compiled: Any) -> dict[str, float]:
    """Bytes of weights over those in float32: of the quantized layers, and of all that the model reads."""
    explanation = qcompile.explain(compiled)
    layers = sum(
        model.get_parameter(f"{path}.weight").nbytes for path in _layers(model, explanation.graphs[-1].quantized)
    )
    everything = sum(parameter.nbytes for parameter in model.parameters())
    held = explanation.graphs[-1].weight_bytes  # those before it are of other recipes
    return {"layer_bytes": (held - (everything - layers)) / layers, "all_bytes": held / everything}


def _layers(model: torch.nn.Module, quantized: Any) -> list[str]:
    named = dict(model.named_parameters())
    return [path for path in quantized if f"{path}.weight" in named]


def _in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, one call of each at a time, so that other load meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for call in runs.values():
        call()
    for _ in range(rounds):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


@app.default
def main(
    *,
    models: list[str] | None = None,
    recipes: list[str] | None = None,
    rounds: int = 25,
    threads: int | None = None,
    tiny: bool = False,
    output: Path | None = None,
) -> int:
    """Time each model with each recipe. Exit code 1 if one is slower than plain Inductor, or takes more memory.

    Parameters
    ----------
    models: vit, minilm; both without it.
    recipes: names of recipes or paths of YAML files; those of the claim without it.
    rounds: calls of each.
    threads: of torch; as many as torch takes without it.
    tiny: small models, to see that it runs.
    output: JSON file, in place of benchmarks/results/cpu_inductor.json.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = recipes or list(RECIPES)
    for recipe in chosen:
        load_recipe(recipe)  # that there is one is known before anything is compiled
    rows = []
    for case in cases(tiny, models):
        rows += measure(case, chosen, rounds)
        record.show(case.name, [row for row in rows if row["model"] == case.name])
    record.write("cpu_inductor", rows, output, rounds=rounds, threads=torch.get_num_threads(), tiny=tiny)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(app())
