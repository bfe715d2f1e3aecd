"""Spellings of former versions: they still work, and say what they are called now."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from qcompile.cli.console import warn
from qcompile.cli.options import UsageError

_OLD = "--to-checkpoint"
_NOT_WITH_IT = (
    "--output",
    "--random-weights",
    "--submodule",
    "--input",
    "--dynamic",
    "--dynamic-batch",
    "--dtype",
    "--save-program",
    "--onnx-target",
    "--opset",
    "--block-fp8",
    "--io-dtype",
    "--compare",
    "--no-compare",
    "--engine",
    "--target",
    "--profile",
    "--expect",
)


def current(tokens: Sequence[str]) -> list[str]:
    """The arguments as they are written today: `export --to-checkpoint DIR` is `checkpoint --output DIR`.

    Raises:
        UsageError: an option of `export` that never went with --to-checkpoint, or one of `checkpoint` without it.
    """
    command = next((token for token in tokens if not token.startswith("-")), None)
    names = ["--output" if token == "-o" else token.partition("=")[0] for token in tokens]
    if command != "export" or not {_OLD, "--format"} & set(names) or "--help" in names:
        return list(tokens)
    if _OLD not in names:
        raise UsageError("--format is for a checkpoint, which `qcompile checkpoint` writes")
    if others := [name for name in names if name in _NOT_WITH_IT]:
        raise UsageError(f"{', '.join(others)}: not with {_OLD}, which writes that and no ONNX file")
    place = list(tokens).index("export")
    renamed = [
        f"--output{token[len(_OLD) :]}" if name == _OLD else token for name, token in zip(names, tokens, strict=True)
    ]
    renamed[place] = "checkpoint"
    warn(f"export {_OLD} is a command of its own and will go; it is: {shlex.join(['qcompile', *renamed])}")
    return renamed
