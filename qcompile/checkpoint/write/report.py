"""The report of a checkpoint: what was quantized, what was not, and which files there are."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field


@dataclass
class CheckpointReport:
    """What `save_checkpoint` wrote.

    Attributes:
        format, recipe: what was asked for; of a program, the recipe that it was quantized with.
        quantized: layer, as recipes name it -> its scheme in words. A fused weight of all experts counts once.
        unquantized: the other layers with a weight matrix: heads, routers, embeddings, convolutions.
        kv_cache: scales of an FP8 key/value cache are in it.
        notices: rules of the recipe that had no effect, and what was left out or carried over.
        files: names, in alphabetical order.
        bytes: of all tensors.
        seconds: it took.
    """

    format: str
    recipe: str
    quantized: dict[str, str]
    unquantized: list[str]
    kv_cache: bool
    notices: list[str]
    files: list[str]
    bytes: int
    seconds: float
    kind: str = field(default="checkpoint", init=False)

    def to_json(self) -> str:
        """The report as JSON text; `qcompile inspect` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2)
