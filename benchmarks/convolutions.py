"""Claim: a ResNet whose convolutions are INT8 or FP8 gives the top-1 of float, in the program and in ONNX Runtime.

Cross-validation makes every one of the 1,797 digits that scikit-learn has a held-out image: they are dealt out into ten
folds, and a small ResNet (batch norms, strides, residual adds), trained on nine of them from two initializations,
answers for the tenth. Which images near the edge fall over is chance, and a fold has 180: the claim is about all of the
answers together. What a recipe lost and won beside float tells how much of the difference is that. Each recipe
calibrates on training images; the same held-out images go through the float model, the program, and the portable file
in ONNX Runtime. Kernels are those of a TensorRT-RTX engine for SM89, beside those of the model in half precision as
torch's own exporter writes it.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import torch
from torch import Tensor, nn

import qcompile
from benchmarks import record
from benchmarks.convnets import ResNet, basic, conv
from benchmarks.fast import of_max
from benchmarks.fusion import export_unquantized
from benchmarks.models import Example

app = cyclopts.App(help=__doc__)

RECIPES = ("int8", "fp8")
FOLDS = 10
SEEDS = (0, 1)
MOST = 0.3  # points of top-1, between float and what is quantized
TARGET = "sm89"


@dataclass(frozen=True)
class Network:
    """One network with one recipe: which of its held-out images it names right, and what is known of its file and
    engine."""

    unquantized: Tensor
    program: Tensor
    onnxruntime: Tensor
    quantized: int
    convolutions: int
    low_precision: int
    kernels: int


@dataclass
class Row:
    """One recipe.

    Attributes:
        images: held out, of all networks. unquantized, program, onnxruntime: top-1 in percent.
        lost, won: how many images the unquantized network alone, or the program alone, names right.
        quantized, convolutions: how many convolutions are by the report, and how many there are.
        low_precision: how many are by the layer list of the engine.
        kernels, half_kernels: of the engine, and of that of the unquantized model in half precision.
    """

    recipe: str
    networks: int
    images: int
    unquantized: float
    program: float
    onnxruntime: float
    lost: int
    won: int
    quantized: int
    convolutions: int
    low_precision: int
    kernels: int
    half_kernels: int

    @property
    def ok(self) -> bool:
        distance = max(abs(found - self.unquantized) for found in (self.program, self.onnxruntime))
        return distance <= MOST and self.low_precision == self.quantized

    def cells(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "float": f"{self.unquantized:.2f} %",
            "program": f"{self.program:.2f} %",
            "ONNX Runtime": f"{self.onnxruntime:.2f} %",
            "lost": self.lost,
            "won": self.won,
            "convolutions": f"{self.low_precision} of {self.convolutions}",
            "kernels": self.kernels,
            "half": self.half_kernels,
            "ok": self.ok,
        }


@dataclass(frozen=True)
class Data:
    """Images `[N, 1, 8, 8]` in 0..1 and their digits."""

    images: Tensor
    digits: Tensor

    def right(self, logits: Tensor) -> Tensor:
        """Which images they name right."""
        return logits.argmax(1) == self.digits

    def without(self, fold: slice) -> Data:
        kept = torch.ones(len(self.digits), dtype=torch.bool)
        kept[fold] = False
        return Data(self.images[kept], self.digits[kept])


def digits() -> Data:
    """All images, in a fixed shuffle."""
    from sklearn.datasets import load_digits  # here, as tests read this module's tables

    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Data(images[order], torch.tensor(found.target)[order])


def trained(data: Data, seed: int, *, width: int = 16, epochs: int = 30) -> ResNet:
    """A ResNet of three stages with one block each, which has seen `data` so many times; the same for a `seed`."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = ResNet(basic, (1, 1, 1), width, classes=10, stem=conv(1, width, 3)).train()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
        batches = -(-len(data.images) // 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * batches)
        for _ in range(epochs):
            for chosen in torch.randperm(len(data.images)).split(64):  # type: ignore[no-untyped-call]
                loss = nn.functional.cross_entropy(model(data.images[chosen]), data.digits[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return model.eval().requires_grad_(False)


def measure(example: Example, held_out: Data, recipe: str, path: Path) -> Network:
    program = example.quantized(recipe=of_max(recipe, "convolutions=all"))
    report = qcompile.export_onnx(program, path, target="portable")
    session = qcompile.onnx_session(path)
    found = session.run(None, {session.get_inputs()[0].name: held_out.images.numpy()})[0]
    built = qcompile.build_engine(program, None, target=TARGET, profiles=example.profiles, progress=False)
    return Network(
        held_out.right(example.model(held_out.images)),
        held_out.right(program.module()(held_out.images)),
        held_out.right(torch.from_numpy(found)),
        *report.coverage["convolution"],
        built.convolutions[recipe],
        built.kernels,
    )


def example_of(model: nn.Module, seen: Data) -> Example:
    image = seen.images.shape[1:]
    profiles = {"x": ((1, *image), (4, *image), (64, *image))}
    return Example(model, (seen.images[:4],), {}, [seen.images[:256]], ({0: torch.export.Dim.DYNAMIC},), profiles)


def run(*, tiny: bool = False) -> list[Row]:
    """A row for each recipe; `tiny` trains one narrow network for a moment."""
    every = digits()
    chosen = [(slice(fold, None, FOLDS), seed) for seed in SEEDS for fold in range(FOLDS)][: 1 if tiny else None]
    found: dict[str, list[Network]] = {recipe: [] for recipe in RECIPES}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for fold, seed in chosen:
            size = {"width": 8, "epochs": 3} if tiny else {}
            seen, held_out = every.without(fold), Data(every.images[fold], every.digits[fold])
            example = example_of(trained(seen, seed, **size), seen)
            for recipe, networks in found.items():
                networks.append(measure(example, held_out, recipe, Path(folder) / "model.onnx"))
                row = joined(recipe, networks[-1:], 0)
                print(f"fold {fold.start + 1}, seed {seed}: {row.cells()}", file=sys.stderr, flush=True)
        path = Path(folder) / "half.onnx"
        export_unquantized(example, torch.float16, path)
        rival = qcompile.build_engine(path, None, target=TARGET, profiles=example.profiles, progress=False)
    return [joined(recipe, networks, rival.kernels) for recipe, networks in found.items()]


def joined(recipe: str, networks: list[Network], half_kernels: int) -> Row:
    """All networks of a recipe, which differ in their weights alone."""
    right = {
        name: torch.cat([getattr(n, name) for n in networks]) for name in ("unquantized", "program", "onnxruntime")
    }
    unquantized, program = right["unquantized"], right["program"]
    return Row(
        recipe,
        len(networks),
        len(unquantized),
        **{name: 100 * found.double().mean().item() for name, found in right.items()},
        lost=int((unquantized & ~program).sum()),
        won=int((program & ~unquantized).sum()),
        quantized=min(n.quantized for n in networks),
        convolutions=networks[0].convolutions,
        low_precision=min(n.low_precision for n in networks),
        kernels=max(n.kernels for n in networks),
        half_kernels=half_kernels,
    )


@app.default
def main(*, tiny: bool = False, output: Annotated[Path | None, cyclopts.Parameter(name="--json")] = None) -> int:
    """Train the networks and measure every recipe. Exit code 1 if one is further from float than is claimed.

    Parameters
    ----------
    tiny: a narrow network that is trained for a moment, as the tests do.
    output: JSON file, in place of benchmarks/results/convolutions.json.
    """
    torch.set_num_threads(1)
    rows = run(tiny=tiny)
    record.show("Digits", [row.cells() for row in rows])
    record.write("convolutions", [asdict(row) for row in rows], output, tiny=tiny)
    return int(not all(row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(app())
