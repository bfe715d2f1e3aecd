"""Claim: attentions and GEMMs of common models run in FP8 on SM89 and SM120, in NVFP4 on SM120, in few kernels.

For each model: quantize with its recipe, export, build engines ahead of time and read the builder's layer list.
The rival is the unquantized model in half precision, exported by `torch.onnx.export(dynamo=True)`, in the same builder.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cyclopts
import torch
from torch.utils import _pytree as pytree

import qcompile
from benchmarks import record
from benchmarks.cases import CASES, Case
from benchmarks.fast import of_max
from benchmarks.models import Example
from qcompile import EngineReport

app = cyclopts.App(help=__doc__)


@dataclass(frozen=True)
class Row:
    """One model on one target; `misses` are the bars that it does not reach, in words.

    per_block: kernels of three blocks less those of two. half_kernels: of the unquantized model's engine.
    """

    model: str
    recipe: str
    target: str
    layers: int
    attention_fp8: int
    attention_total: int
    gemm_fp8: int
    gemm_fp4: int
    gemm_total: int
    kernels: int
    half_kernels: int | None
    per_block: int | None
    bar: str
    misses: tuple[str, ...]
    not_fp8: tuple[str, ...]

    def cells(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "recipe": self.recipe,
            "target": self.target,
            "layers": self.layers,
            "attention FP8": f"{self.attention_fp8}/{self.attention_total}",
            "GEMMs FP8": f"{self.gemm_fp8}/{self.gemm_total}",
            "FP4": self.gemm_fp4,
            "kernels": self.kernels,
            "half": self.half_kernels,
            "per block": self.per_block,
            "bar": self.bar,
            "ok": not self.misses,
        }


def compile_case(case: Case, example: Example, path: Path) -> qcompile.Report:
    """Quantize and export `example` to `path`."""
    return qcompile.export_onnx(example.quantized(recipe=of_max(case.recipe), dtype=case.dtype), path)


def export_unquantized(example: Example, dtype: torch.dtype, path: Path) -> None:
    """The same model in `dtype`, by torch alone."""
    model = copy.deepcopy(example.model).to(dtype)
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (example.args, example.kwargs)
    )
    torch.onnx.export(
        model, args, path, kwargs=kwargs, dynamo=True, dynamic_shapes=example.dynamic_shapes, verbose=False
    )


def engine(path: Path, target: str, example: Example) -> EngineReport:
    return qcompile.build_engine(path, target=target, profiles=example.profiles, progress=False)


def measure(case: Case, targets: Sequence[str], *, layers: int | None = None, tiny: bool = False) -> Iterator[Row]:
    """One row for each target. `layers` and `tiny` shrink the model."""
    layers = layers or case.layers(tiny=tiny)
    with tempfile.TemporaryDirectory() as folder:
        quantized, unquantized = Path(folder) / "fp8.onnx", Path(folder) / "half.onnx"
        example = case.example(tiny=tiny, layers=layers)
        compile_case(case, example, quantized)
        export_unquantized(example, case.dtype, unquantized)
        blocks = {}
        for count in (2, 3):
            blocks[count] = quantized if count == layers else Path(folder) / f"{count}.onnx"
            if count != layers:
                compile_case(case, case.example(tiny=tiny, layers=count), blocks[count])
        for target in targets:
            built = engine(quantized, target, example)
            per_block = [
                built.kernels if path == quantized else engine(path, target, example).kernels
                for path in blocks.values()
            ]
            half = engine(unquantized, target, example).kernels
            yield judge(case, built, layers, half_kernels=half, per_block=per_block[1] - per_block[0])


def judge(
    case: Case, built: EngineReport, layers: int, half_kernels: int | None = None, per_block: int | None = None
) -> Row:
    """Hold an engine against the bars of its case; a count that is None is not judged."""
    gaps = [gap for gap in built.not_low_precision if not case.is_excluded(gap.module)]
    wide = [gap for gap in gaps if gap.kind != "attention"]
    gemm_fp8 = built.gemms["fp8"] + built.convolutions["fp8"]
    other = {m: p for m, p in built.precisions.items() if not case.is_excluded(m) and p != case.wanted(m)}
    attentions = layers if case.fp8_attention else 0
    bars, misses = [f"{attentions} attentions", "all GEMMs"], []
    if built.attention.fp8 != attentions or built.attention.total != layers:
        misses.append(f"{built.attention.fp8} of {built.attention.total} attentions in FP8, not {attentions}")
    if other:
        misses.append(f"GEMMs in another type: {', '.join(f'{m} in {p}' for m, p in other.items())}")
    if case.per_block is not None and per_block is not None:
        bars.append(f"<= {case.per_block} a block")
        if per_block > case.per_block:
            misses.append(f"{per_block} kernels for each further block, more than {case.per_block}")
    # what a model runs once, before and after its blocks, outweighs a few of them
    if case.beats_half and half_kernels is not None and layers >= case.full.layers:
        bars.append(f"< {half_kernels}")
        if built.kernels >= half_kernels:
            misses.append(f"{built.kernels} kernels, no fewer than the {half_kernels} of the unquantized model")
    return Row(
        model=case.name,
        recipe=case.recipe,
        target=built.target,
        layers=layers,
        attention_fp8=built.attention.fp8,
        attention_total=built.attention.total,
        gemm_fp8=gemm_fp8,
        gemm_fp4=built.gemms["fp4"],
        gemm_total=gemm_fp8 + built.gemms["fp4"] + len(wide),
        kernels=built.kernels,
        half_kernels=half_kernels,
        per_block=per_block,
        bar=", ".join(bars),
        misses=tuple(misses),
        not_fp8=tuple(f"{gap.kind} {gap.module}: {gap.reason}" for gap in built.not_low_precision),
    )


@app.default
def main(
    *,
    models: list[str] | None = None,
    targets: list[str] | None = None,
    layers: int | None = None,
    tiny: bool = False,
    output: Path | None = None,
) -> int:
    """Build every model for every target. Exit code 1 if any bar is missed.

    Parameters
    ----------
    models: names of rows to run, such as vit or llama-bf16; all of them without it.
    targets: such as sm89; those of each model without it.
    layers: number of blocks, in place of each model's own.
    tiny: the small sizes that the tests use.
    output: JSON file, in place of benchmarks/results/fusion.json.
    """
    known = [case.name for case in CASES]
    if unknown := set(models or ()) - set(known):
        print(f"unknown models {', '.join(sorted(unknown))}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    rows = []
    for case in CASES:
        if models is None or case.name in models:
            for row in measure(case, targets or case.targets, layers=layers, tiny=tiny):
                rows.append(row)
                print(f"{row.model} {row.target}: {'; '.join(row.misses) or 'ok'}", file=sys.stderr, flush=True)
    record.show("Kernels of TensorRT engines", [row.cells() for row in rows])
    for row in rows:
        for miss in row.misses:
            print(f"MISSED  {row.model} {row.target}: {miss}")
    record.write("fusion", [asdict(row) for row in rows], output, layers=layers, tiny=tiny)
    return int(any(row.misses for row in rows))


if __name__ == "__main__":
    sys.exit(app())
