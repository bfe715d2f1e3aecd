"""Claim: `convolutions: where_it_pays` adds one kernel at most for each convolution that it quantizes.

For each network, recipe and target: kernels of the engine with no convolution quantized, and with those that pay. The
networks are those of `convolution_zoo`, and a UNet and a VAE's decoder of widths at which convolutions pay.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch

import qcompile
from benchmarks import convnets_more, convolution_zoo, diffusion_zoo, record
from benchmarks.fast import of_max
from benchmarks.models import Example

app = cyclopts.App(help=__doc__)

RECIPES, TARGETS = ("fp8", "int8"), ("sm89", "sm120")
ConvNext = partial(convnets_more.ConvNext, (1, 1, 2, 1))


def _named(*names: str) -> dict[str, Callable[[], Example]]:
    return {name: convolution_zoo.MODELS[name] for name in names}


MODELS: Mapping[str, Callable[[], Example]] = {
    **_named("resnet18", "resnet50", "mobilenet-v3-small", "detector"),
    "convnext": partial(convolution_zoo.image, ConvNext, 224),
    "unet": diffusion_zoo.WIDE["unet"],
    "vae-decoder": partial(convolution_zoo.autoencoder, "decoder", diffusion_zoo.WIDE["autoencoder"]),
}


@dataclass(frozen=True)
class Row:
    """One network with one recipe on one target.

    Attributes:
        quantized, total: convolutions, by the report of the file. half: kernels with none of them quantized.
        kernels: with these.
    """

    model: str
    recipe: str
    target: str
    quantized: int
    total: int
    half: int
    kernels: int

    @property
    def ok(self) -> bool:
        return self.kernels <= self.half + self.quantized

    def cells(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "recipe": self.recipe,
            "target": self.target,
            "convolutions": f"{self.quantized} of {self.total}",
            "half": self.half,
            "kernels": self.kernels,
            "ok": self.ok,
        }


def measure(name: str, recipe: str, targets: Sequence[str] = TARGETS) -> Iterator[Row]:
    """One row for each target."""
    example, counts = MODELS[name](), (0, 0)
    kernels: dict[tuple[str, str], int] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for which in ("none", "where_it_pays"):
            path = Path(folder) / "model.onnx"
            program = example.quantized(recipe=of_max(recipe, f"convolutions={which}"))
            counts = qcompile.export_onnx(program, path, io_dtype=torch.float16).coverage["convolution"]
            for target in targets:
                kernels[which, target] = qcompile.build_engine(path, target=target, progress=False).kernels
    for target in targets:
        yield Row(name, recipe, target, *counts, kernels["none", target], kernels["where_it_pays", target])


@app.default
def main(
    *,
    only: list[str] | None = None,
    recipes: list[str] | None = None,
    output: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None,
) -> int:
    """Build every network with every recipe for every target. Exit code 1 if one has too many kernels.

    Parameters
    ----------
    only: names of networks; all of them without it.
    recipes: fp8 and int8 without it.
    output: JSON file, in place of benchmarks/results/paying.json; rows that are not measured again are kept.
    """
    path = output or record.RESULTS / "paying.json"
    found = {(r["model"], r["recipe"], r["target"]): r for r in _kept(path)}
    rows: list[Row] = []
    for name in only or MODELS:
        for recipe in recipes or RECIPES:
            rows += measure(name, recipe)
            print(*rows[-1].cells().values(), file=sys.stderr, flush=True)
    found |= {(row.model, row.recipe, row.target): asdict(row) for row in rows}
    order = ((name, recipe, target) for name in MODELS for recipe in RECIPES for target in TARGETS)
    record.write("paying", [found[key] for key in order if key in found], path)
    record.show("Convolutions where it pays", [row.cells() for row in rows])
    return int(not all(row.ok for row in rows))


def _kept(path: Path) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = json.loads(path.read_text())["results"] if path.exists() else []
    return kept


if __name__ == "__main__":
    sys.exit(app())
