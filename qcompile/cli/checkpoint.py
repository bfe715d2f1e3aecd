"""`qcompile checkpoint`: from a Hugging Face directory to a quantized one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.text import Text

from qcompile.cli.console import interactive, out, step, write_report
from qcompile.cli.data import NO_DATA, DataOptions
from qcompile.cli.options import UsageError
from qcompile.cli.parameters import MODEL, QUANTIZATION, SEVERAL, SWITCH, check_sizes
from qcompile.cli.started import is_first
from qcompile.outputs import check_distinct, check_writable
from qcompile.report.tables import show_checkpoint

if TYPE_CHECKING:
    from qcompile.checkpoint.write.report import CheckpointReport

_DEFAULT_FORMAT = "fp8"


def checkpoint(
    source: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    format: Literal["fp8", "modelopt", "modelopt_mixed", "compressed-tensors"] | None = None,
    report: Path | None = None,
    dry_run: Annotated[bool, SWITCH] = False,
    batch: Annotated[int, MODEL] = 1,
    recipe: Annotated[str | None, QUANTIZATION] = None,
    set_: Annotated[list[str], QUANTIZATION, SEVERAL, Parameter(name="--set")] = [],  # noqa: B006  # nobody changes it
    data: DataOptions = NO_DATA,
) -> int:
    """Quantize a Hugging Face directory to another one, for vLLM, SGLang and transformers.

    ```
    qcompile checkpoint ./llama -o ./llama-fp8
    qcompile checkpoint ./llama -o ./llama-int8 --format compressed-tensors --recipe int8_per_channel_per_token
    qcompile checkpoint ./llama -o ./llama-fp4 --format modelopt --recipe nvfp4 --calibration text.txt
    qcompile checkpoint ./llama -o ./llama-fp8 --dry-run
    ```

    The directory is there when it is complete and good, or not at all.

    Parameters
    ----------
    source:
        A Hugging Face directory (config.json, weights). It is read one tensor at a time and may be larger than memory.
    output:
        Directory to write, which is new or empty.
    format:
        fp8: FP8 in blocks of 128 x 128, activations dynamic (recipe fp8_block, which is the default then); modelopt:
        FP8, INT4, NVFP4 and mixtures; modelopt_mixed: these with the algorithm of each layer, as MIXED_PRECISION,
        also where all have one; compressed-tensors: all of these, blocks beside NVFP4, and INT8. Default: fp8.
    report:
        Write what was quantized, what was not and why to this JSON file.
    dry_run:
        Show what would be quantized and written, and stop there.
    batch:
        Batch size that the model is calibrated with.
    recipe:
        Name of a shipped recipe ("qcompile recipes list" has all) or path of a YAML file. Recipes with static
        activations (fp8, nvfp4) need --calibration, which loads the model in float32; recipes for weights or with
        dynamic activations need none.
    set_:
        Change the recipe, as path=value: `'rules[+]={quantizer: "*.layers.0.*", enable: false}'`.
    """
    check_sizes({"--batch": batch})
    data.check()
    if output is None:
        raise UsageError("say what to write: --output DIR for the new directory")
    check_writable(report)
    inputs = [("the model", source), ("the calibration data", data.calibration), ("the recipe", recipe)]
    check_distinct({"--report": report}, inputs)
    written = _write(source, output, format, recipe, set_, data, batch, dry_run)
    if report is not None and written is not None and not dry_run:
        from qcompile.cli.report import CommandReport

        write_report(report, CommandReport(source=source, checkpoint=written, new=[str(output)]))
    return 0


def _write(
    source: str,
    target: Path,
    format: str | None,
    recipe: str | None,
    overrides: Sequence[str],
    options: DataOptions,
    batch: int,
    dry_run: bool,
) -> CheckpointReport | None:
    """Write the checkpoint and show its report; None where another process does."""
    import torch

    import qcompile
    from qcompile.checkpoint.files.directory import check_new
    from qcompile.checkpoint.write.job import DEFAULT_RECIPES, check_names
    from qcompile.checkpoint.write.save import save_checkpoint
    from qcompile.cli.ahead import check_needs_no_data
    from qcompile.source import load_source, open_calibration

    if not Path(source).is_dir():
        raise UsageError(f"a checkpoint is made from a Hugging Face directory, and {source} is none")
    data = None
    if options.calibration is not None:
        data = open_calibration(options.calibration, source, options.samples, options.preparation())
    chosen_format: Any = format or _DEFAULT_FORMAT
    name = recipe or DEFAULT_RECIPES.get(chosen_format)
    if name is None:
        raise UsageError(
            f"--format {chosen_format} holds many schemes: say which with --recipe, such as nvfp4_weight_only, or fp8"
            " with --calibration"
        )
    chosen = qcompile.load_recipe(name, overrides)
    check_new(target)
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
        loaded = load_source(source, batch=batch, sequence=options.sequence, shapes=data.shapes())
        program, _ = quantized(loaded, chosen, data, torch.float32)  # in half, scales would be rounded to it
        if not is_first():
            return None
        step(f"writing {target}")
        report = save_checkpoint(program, target, format=chosen_format, source=source, progress=interactive())
    show_checkpoint(out(), report.data(), target)
    return report
