"""`qcompile calibrate`: ranges of activations now, for an export later or elsewhere; of all data or of a shard."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qcompile.cli.console import interactive, step, warn
from qcompile.cli.data import NO_DATA, DataOptions
from qcompile.cli.options import HOW_TO_CALIBRATE, RANDOM_DATA, UsageError
from qcompile.cli.parameters import MODEL, QUANTIZATION, SEVERAL, SWITCH, check_sizes
from qcompile.cli.started import is_first
from qcompile.outputs import check_distinct, check_writable
from qcompile.remedy import with_remedy


def calibrate(
    source: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    shard: str | None = None,
    weights: Annotated[bool, SWITCH] = False,
    batch: Annotated[int, MODEL] = 1,
    submodule: Annotated[str | None, MODEL] = None,
    input_: Annotated[list[str], MODEL, SEVERAL, Parameter(name="--input")] = [],  # noqa: B006
    dynamic: Annotated[list[str], MODEL, SEVERAL] = [],  # noqa: B006  # nobody changes it
    dynamic_batch: Annotated[bool, MODEL, SWITCH] = False,
    recipe: Annotated[str, QUANTIZATION] = "fp8",
    set_: Annotated[list[str], QUANTIZATION, SEVERAL, Parameter(name="--set")] = [],  # noqa: B006
    data: DataOptions = NO_DATA,
) -> int:
    """Find the ranges that a recipe needs and write them to a file, which --calibration of other commands takes.

    ```
    qcompile calibrate ./vit-base -o state.safetensors --calibration photos/
    qcompile export ./vit-base -o vit.onnx --calibration state.safetensors
    ```

    Shards of the data can be seen by processes that know nothing of each other, such as those of a job array:

    ```
    qcompile calibrate ./vit-base --shard 2/8 -o part-2.safetensors --calibration photos/
    qcompile merge part-*.safetensors -o state.safetensors
    ```

    Parameters
    ----------
    source:
        The model, as `qcompile export` takes it.
    output:
        Where to write the state, a .safetensors file.
    shard:
        See every eighth batch, from the second on: 2/8. All shards are given the same data, and take their own.
    weights:
        Also keep what algorithms such as gptq want for weights, so that the export needs no data: 16 K x K bytes for
        what layers with K inputs read. Without it they do for weights what they do without data.
    batch:
        Batch size of a directory's example inputs, and of the batches that calibrate.
    submodule:
        Take this part of a directory's model, such as model.encoder of Whisper.
    input_:
        Declare an example input, as name=shape:dtype: x=2x8x64:float32 ids=2:int64.
    dynamic:
        Make an axis of an input dynamic, as input:axis=dimension[:least:largest].
    dynamic_batch:
        Make axis 0 of every input dynamic.
    recipe:
        Name of a shipped recipe or path of a YAML file: that of the export.
    set_:
        Change the recipe, as path=value, in the same way as for the export.
    """
    check_sizes({"--batch": batch})
    data.check()
    part = _shard(shard)
    if output is None or output.suffix != ".safetensors":
        raise UsageError("say what to write: --output FILE.safetensors")
    if data.calibration is None:
        raise with_remedy(UsageError(f"say what to calibrate with: {HOW_TO_CALIBRATE}"), RANDOM_DATA)
    check_writable(output)
    inputs = [("the model", source), ("the calibration data", data.calibration), ("the recipe", recipe)]
    check_distinct({"--output": output}, inputs)

    import qcompile
    from qcompile.source import load_source, open_calibration, parse_inputs, with_dynamic_shapes
    from qcompile.source.calibration import MADE_UP
    from qcompile.source.state_files import StateFile, write_state

    chosen = qcompile.load_recipe(recipe, set_)
    opened = open_calibration(data.calibration, source, data.samples, data.preparation())
    if isinstance(opened, StateFile):
        raise UsageError(f"{data.calibration} is a calibrated state: give the data that it is to be made of")
    step(f"loading {source}")
    loaded = load_source(
        source,
        batch=batch,
        sequence=data.sequence,
        submodule=submodule,
        shapes=opened.shapes(),
        inputs=parse_inputs(input_),
    )
    loaded = with_dynamic_shapes(loaded, dynamic, batch=dynamic_batch)
    batches = opened.batches(loaded)
    of = f", shard {shard}" if shard else ""
    step(f"calibrating for the recipe {chosen.metadata.name} with {opened}{of}")
    if MADE_UP in opened.notices:
        warn(MADE_UP)
    given = (loaded.args, loaded.kwargs) if loaded.program is None else ((), None)
    state = qcompile.calibrate(
        loaded.model,
        *given,
        recipe=chosen,
        calibration=batches,
        dynamic_shapes=loaded.dynamic_shapes,
        progress=interactive(),
        shard=part,
        weights=weights,
    )
    if is_first():
        write_state(state, output)
    return 0


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text}: write it as 2/8, the second of eight; the last is 8/8")
    return int(match[1]), int(match[2])
