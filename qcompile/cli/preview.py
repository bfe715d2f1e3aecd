"""`qcompile export --dry-run`: what an export would capture, quantize, decline and write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.text import Text
from torch.export import ExportedProgram

from qcompile.cli.console import out
from qcompile.cli.wanted import Wanted
from qcompile.onnx.export import modules_of
from qcompile.report.record import record_of
from qcompile.report.tables import add, show_coverage, show_declines, show_notices, size, table
from qcompile.sizes import program_bytes
from qcompile.source import Data, Source


class AnyRange(Mapping[str, torch.Tensor]):
    """In the place of what `qcompile.calibrate` returns: every tensor reaches 1, so that no data are needed."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.tensor(1.0)

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def show_preview(wanted: Wanted, source: Source, program: ExportedProgram, calibration: Data | None) -> None:
    """`program` is quantized with `AnyRange`, or was quantized before."""
    console, noted = out(), record_of(program)
    modules = modules_of(program, wanted.onnx_target)
    console.print(Text(f"Dry run of {source.name}: nothing is written", style="bold"))
    inputs = table("Inputs", "name", "shape", "dtype")
    examples, dims = source.inputs, source.dims
    for name, shape in dims.items():
        add(inputs, name, f"[{', '.join(map(str, shape))}]", str(examples[name].dtype).removeprefix("torch."))
    console.print(inputs)
    data: dict[str, Any] = {
        "quantized": modules.quantized,
        "unquantized": modules.unquantized,
        "reasons": modules.reasons,
        "coverage": modules.coverage,
    }
    show_coverage(console, data)
    show_declines(console, [vars(decline) for decline in noted.declined])
    show_notices(console, [notice for notice in noted.notices if not notice.startswith("no calibration data")])
    told = f"calibration data: {calibration or 'none'}; layers that it does not reach will not be quantized"
    console.print(Text(told), soft_wrap=True)
    files = table("Files", "path", "what", "size, about", numbers=("size, about",))
    weights = size(program_bytes(program))
    add(files, wanted.output, "ONNX", weights)
    if wanted.folder is not None:
        add(files, wanted.folder, "tokenizer and configurations of its runtimes", "")
    if wanted.save_program is not None:
        add(files, wanted.save_program, "program", weights)
    if wanted.builds:
        name = f"engine for {wanted.target or 'the GPU of this machine'}"
        add(files, wanted.engine or "(not kept)", name, weights)
    if wanted.report is not None:
        add(files, wanted.report, "report", "")
    console.print(files)
