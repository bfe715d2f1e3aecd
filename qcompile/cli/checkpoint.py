"""The checkpoint part of `qcompile export`: from a Hugging Face directory to a quantized one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from qcompile.cli.console import interactive, out, step
from qcompile.cli.options import UsageError
from qcompile.report.tables import show_checkpoint

if TYPE_CHECKING:
    from qcompile.checkpoint.write.report import CheckpointReport

_DEFAULT_FORMAT = "fp8"


def write_checkpoint(
    source: str,
    target: Path,
    format: str | None,
    recipe: str | None,
    overrides: Sequence[str],
    calibration: str | None,
    samples: int | None,
    batch: int,
    sequence: int | None,
    dry_run: bool,
) -> CheckpointReport:
    """Write the checkpoint, show its report, and return it."""
    import torch

    import qcompile
    from qcompile.checkpoint.files.directory import check_new
    from qcompile.checkpoint.write.job import DEFAULT_RECIPES, check_names
    from qcompile.checkpoint.write.save import save_checkpoint
    from qcompile.cli.ahead import check_needs_no_data
    from qcompile.source import load_source, open_calibration

    if not Path(source).is_dir():
        raise UsageError(f"a checkpoint is made from a Hugging Face directory, and {source} is none")
    data = open_calibration(calibration, source, samples) if calibration is not None else None
    chosen_format: Any = format or _DEFAULT_FORMAT
    name = recipe or DEFAULT_RECIPES.get(chosen_format)
    if name is None:
        raise UsageError(
            f"--format {chosen_format} holds many schemes: say which with --recipe, such as nvfp4_weight_only, or fp8"
            " with --calibration"
        )
    chosen = qcompile.load_recipe(name, overrides)
    check_new(target)
    notices: list[str] = []
    if dry_run:
        report = check_names(source, target, chosen_format, chosen)
        out().print(Text(f"Dry run of {source}: nothing is written", style="bold"))
    elif data is None:
        check_needs_no_data(chosen)
        step(f"writing {target} with the recipe {chosen.metadata.name}")
        report = save_checkpoint(source, target, format=chosen_format, recipe=chosen, progress=interactive())
    else:
        from qcompile.cli.quantize import quantized

        check_names(source, target, chosen_format, chosen)
        step(f"loading {source}")
        loaded = load_source(source, batch=batch, sequence=sequence, shapes=data.shapes())
        program, _ = quantized(loaded, chosen, data, torch.float32)  # in half, scales would be rounded to it
        step(f"writing {target}")
        report = save_checkpoint(program, target, format=chosen_format, source=source, progress=interactive())
        notices = data.notices
    report = report.after(notices)
    show_checkpoint(out(), report.data(), target)
    return report
