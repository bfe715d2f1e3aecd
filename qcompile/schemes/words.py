"""How recipes spell the formats of the IR: one row for each. Nothing here needs torch.

`passes.formats` says what a format is, `passes.capabilities` what multiplies it, and `qcompile.schemes.scheme` has the
two of a layer side by side; what other tools call it stands with their files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from passes.formats import (
    FP8,
    FP8_1X128,
    FP8_128X128,
    FP8_PER_TOKEN,
    INT4_GROUPS,
    INT8,
    INT8_PER_TOKEN,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
)

__all__ = [
    "BLOCK_FORMATS",
    "GROUP_SIZES",
    "WEIGHT_FORMATS",
    "WORDS",
    "FormatName",
    "Granularity",
    "Word",
    "block_of",
    "find_word",
    "is_known",
]

FormatName = Literal["fp8", "int8", "int4", "nvfp4", "mxfp8", "mxfp4"]
"""What a rule can say after `format:`; mxfp8 and mxfp4 are for checkpoints and torch.compile."""

Granularity = Literal["per_tensor", "per_channel", "per_token", "per_block"]


@dataclass(frozen=True)
class Word:
    """What a quantizer with this layout is in the IR.

    Attributes:
        ir: the format.
        granularity: what shares one scale.
        block_shape: rows and columns of a block, with `per_block`.
        dynamic: whether scales come from run time: False for a weight, True for an activation that is measured.
    """

    ir: Format
    granularity: Granularity
    block_shape: tuple[int, int] | None = None
    dynamic: tuple[bool, ...] = (False,)

    @property
    def format(self) -> str:
        """What a rule says after `format:`."""
        return self.ir.family


WORDS = (
    Word(FP8, "per_tensor"),
    Word(FP8, "per_channel"),
    Word(FP8_PER_TOKEN, "per_token", dynamic=(True,)),
    Word(FP8_1X128, "per_block", (1, 128), dynamic=(True,)),
    Word(FP8_128X128, "per_block", (128, 128)),
    Word(INT8, "per_tensor"),
    Word(INT8, "per_channel"),
    Word(INT8_PER_TOKEN, "per_token", dynamic=(True,)),
    Word(NVFP4, "per_block", (1, 16), dynamic=(False, True)),
    *(Word(fmt, "per_block", (1, 32), dynamic=(False, True)) for fmt in (MXFP8, MXFP4)),
    *(Word(fmt, "per_block", (1, size)) for size, fmt in INT4_GROUPS.items()),
)
"""Every layout that runs, a weight's static and an activation's static or from run time."""

BLOCK_FORMATS: dict[str, tuple[int, int]] = {"nvfp4": (1, NVFP4.sizes[0]), "mxfp8": (1, 32), "mxfp4": (1, 32)}
"""Formats whose blocks are part of the format itself, along the reduction axis."""

GROUP_SIZES: dict[str, tuple[int, ...]] = {"int4": tuple(INT4_GROUPS)}
"""Formats whose blocks are groups of one row, and how many elements these can have; the last is the default."""

WEIGHT_FORMATS = frozenset({"int4"})
"""Formats that no input is quantized to."""


def block_of(format: str, group_size: int | None) -> tuple[int, int] | None:
    """The block that belongs to the format, of `group_size` where there is a choice; None where it has none."""
    if format in GROUP_SIZES:
        return 1, group_size or GROUP_SIZES[format][-1]
    return BLOCK_FORMATS.get(format)


def find_word(format: str, granularity: str, block_shape: tuple[int, int] | None) -> Word | None:
    """The row of a layout; None for one that nothing runs."""
    layout = (format, granularity, block_shape)
    return next((word for word in WORDS if (word.format, word.granularity, word.block_shape) == layout), None)


def is_known(format: str) -> bool:
    """Whether the IR carries `format` in any layout."""
    return any(word.format == format for word in WORDS)
