"""What `qcompile export --cache` does beside the ONNX file: files for runtimes, and the proof that it generates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompile.checkpoint.files.json_files import CONFIG
from qcompile.cli.console import out, step
from qcompile.cli.wanted import Wanted
from qcompile.decoders import ProgramRun
from qcompile.errors import QCompileError
from qcompile.generation.directory import write_companions
from qcompile.generation.verify import require_steps, verify_steps
from qcompile.report.steps import StepsReport
from qcompile.report.tables import show_steps
from qcompile.source import Source

__all__ = ["add_companions", "behind_a_past", "compare_steps"]


def add_companions(wanted: Wanted, source: Source) -> list[Path]:
    """Files of the model's directory, or of its config where it came from a function, beside the ONNX file."""
    assert wanted.folder is not None
    folder = Path(wanted.source)
    if not (folder / CONFIG).is_file():
        folder = wanted.folder
        for name in ("config", "generation_config"):
            getattr(source.model, name).save_pretrained(folder)
    return write_companions(wanted.output, folder)


def behind_a_past(program: ExportedProgram, batch: Any) -> dict[str, Any]:
    """`batch` as inputs of `program`: its second half, behind the first as past."""
    tokens, mask = _tokens(batch)
    run, half = ProgramRun(program, len(tokens)), tokens.shape[1] // 2
    if half:
        run.step(tokens[:, :half], mask[:, :half])
    return run.inputs(tokens[:, half:], mask[:, half:])


def compare_steps(path: Path, program: ExportedProgram, batch: Any, source: Source) -> StepsReport:
    """Show how far the file is from the program in each step. Raises VerificationError where it is too far."""
    step("comparing the file with the program, token by token")
    context = getattr(getattr(source.model, "config", None), "max_position_embeddings", None)
    report = verify_steps(path, program, _tokens(batch)[0], context=context)
    show_steps(out(), report.data())
    require_steps(report)
    return report


def _tokens(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, of a batch that calibrated a decoder, or might have."""
    found = batch if isinstance(batch, Mapping) else dict(zip(("input_ids", "attention_mask"), batch, strict=False))
    ids = found.get("input_ids")
    if not isinstance(ids, torch.Tensor):
        raise QCompileError("a decoder with a cache is compared on input_ids, and the data have none")
    mask = found.get("attention_mask")
    return ids, torch.ones_like(ids) if mask is None else mask
