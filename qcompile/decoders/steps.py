"""A captured decoder step by step: the cache that it gives back is what it is given next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qcompile.errors import CaptureError

__all__ = ["ProgramRun", "has_cache"]

_PAST, _MASK = "past_key_values", "attention_mask"


def has_cache(program: ExportedProgram) -> bool:
    """Whether `program` is a decoder that `quantize(..., cache=)` captured."""
    return program.example_inputs is not None and _PAST in program.example_inputs[1]


class ProgramRun:
    """Runs `program` on one batch of texts; caches are of the type that the program has for them, codes included.

    Attributes:
        past: the cache so far. mask: of all tokens so far, 0 where one is padding.
    """

    def __init__(self, program: ExportedProgram, rows: int) -> None:
        if not has_cache(program):
            raise CaptureError("the program has no key/value cache: quantize the model with cache=")
        assert program.example_inputs is not None
        self._module = program.module()
        examples = program.example_inputs[1][_PAST]
        self.past = pytree.tree_map(lambda kept: _empty(kept, rows), examples)
        self.mask = torch.zeros((rows, 0), dtype=torch.int64, device=pytree.tree_leaves(examples)[0].device)

    def inputs(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """What the program takes for `tokens` `[rows, new]`, whose mask is of the same size."""
        new = torch.ones_like(tokens) if mask is None else mask.to(torch.int64)
        whole = torch.cat([self.mask, new], 1)
        positions = (whole.cumsum(-1) - 1).clamp_min(0)[:, self.mask.shape[1] :]
        return {"input_ids": tokens, _MASK: whole, "position_ids": positions, _PAST: self.past}

    def step(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits `[rows, new or 1, vocabulary]`."""
        given = self.inputs(tokens, mask)
        with torch.no_grad():
            found = self._module(**given)
        self.past, self.mask = found["present"], given[_MASK]
        logits: Tensor = found["logits"]
        return logits


def _empty(kept: Tensor, rows: int) -> Tensor:
    _, heads, _, width = kept.shape
    return torch.zeros((rows, heads, 0, width), device=kept.device).to(kept.dtype)
