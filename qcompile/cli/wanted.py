"""The options of one `qcompile export`, as read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qcompile.decoders import Cache
from qcompile.engine.profiles import Profile
from qcompile.onnx.export import BlockFp8, Target
from qcompile.recipe import Recipe
from qcompile.source import Declared, Preparation


@dataclass(frozen=True)
class Wanted:
    """What of the model becomes which files.

    Attributes:
        given: the recipe was asked for, and is not the default.
        recipe: None quantizes nothing. cache: of a decoder. folder: the directory that `output` goes to, with what a
            decoder's runtimes want beside it; None for the file alone.
        builds: an engine is built, for `target`, or for the GPU of this machine; `engine` is where it is kept.

    The others are called as the options of the command line.
    """

    source: str
    random_weights: int | None
    batch: int
    sequence: int | None
    submodule: str | None
    inputs: Sequence[Declared]
    dynamic: Sequence[str]
    dynamic_batch: bool
    recipe: Recipe | None
    given: bool
    calibration: str | None
    samples: int | None
    preparation: Preparation
    dtype: torch.dtype | None
    save_program: Path | None
    output: Path
    onnx_target: Target
    opset: int | None
    block_fp8: BlockFp8
    io_dtype: torch.dtype | None
    cache: Cache | None
    folder: Path | None
    compare: bool
    builds: bool
    engine: Path | None
    target: str | None
    profiles: Sequence[Profile]
    expect: dict[str, int] | None
    report: Path | None
    dry_run: bool

    @property
    def outputs(self) -> list[Path]:
        """The files that hold the weights."""
        return [path for path in (self.output, self.save_program, self.engine) if path is not None]
