"""The report of a checkpoint: what was quantized, what was not, and which files there are."""

from __future__ import annotations

from typing import Literal

from qcompile.report.base import ModelReport


class CheckpointReport(ModelReport):
    """What `save_checkpoint` wrote.

    Attributes:
        format, recipe: what was asked for; of a program, the recipe that it was quantized with.
        quantized: layer, as recipes name it -> its scheme in words. A fused weight of all experts counts once.
        unquantized: the other layers with a weight matrix -> what they are: `linear`, `experts`, `convolution`,
            `transposed_convolution`, or the class of an embedding or the like.
        reasons: those that no checkpoint holds quantized -> why.
        coverage: `linear`, `experts`, `convolution` -> (how many are quantized, how many there are).
        declined: layers that checkpoints hold in floating point, or that this one has to, with the reason; and what was
            declined when a program was quantized.
        kv_cache: scales of an FP8 key/value cache are in it.
        notices: rules of the recipe that had no effect, and what was left out or carried over.
        files: names, in alphabetical order.
        bytes: of all tensors.
        seconds: it took.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    format: str
    kv_cache: bool
    files: list[str]
    bytes: int
    seconds: float
