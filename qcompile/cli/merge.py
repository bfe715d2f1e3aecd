"""`qcompile merge`: the states of all shards as the one of all data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from qcompile.cli.console import step
from qcompile.cli.options import UsageError
from qcompile.outputs import check_distinct, check_writable


def merge(parts: list[Path], /, *, output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None) -> int:
    """Join what `qcompile calibrate --shard` wrote to the state that one process would have written of all data.

    ```
    qcompile merge part-*.safetensors -o state.safetensors
    ```

    Shards of other models, recipes or data, one that is missing and one that is there twice are refused.

    Parameters
    ----------
    parts:
        The states of all shards, in any order.
    output:
        Where to write the state, for --calibration.
    """
    if output is None:
        raise UsageError("say what to write: --output FILE")
    if output.suffix != ".safetensors":
        raise UsageError(f"--output {output}: a state is a .safetensors file")
    check_writable(output)
    check_distinct({"--output": output}, [("a part", str(part)) for part in parts])

    from qcompile.quantization.shards import merge_states
    from qcompile.source.state_files import read_state, write_state

    state = merge_states([read_state(part) for part in parts], [str(part) for part in parts])
    write_state(state, output)
    step(f"{output} has the calibration of {len(parts)} shards")
    return 0
