"""Whether the numbers of a tensor that a caller or a file gives can be taken as they are."""

from __future__ import annotations

import torch

MOST_UNPACKED, MOST_FACTOR = 200_000_000, 200
"""A mask of ones is a few bytes, repeated; what is that much less than its bytes, and these are many, fills memory."""


def unusable(tensor: torch.Tensor) -> str | None:
    """What is wrong with a tensor whose numbers cannot be taken as they are, or None."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
        return f"is a tensor of the kind {kind.removeprefix('torch.')}; give a plain one, as tensor.to_dense() makes it"
    if tensor.is_meta:
        return "is on the meta device and has no values"
    held, said = tensor.untyped_storage().nbytes(), tensor.nbytes
    if said > MOST_UNPACKED and said > MOST_FACTOR * held:
        return f"is {list(tensor.shape)} and holds {held} bytes, repeated: give it with values of its own"
    return None
