"""INT4 codes as checkpoints pack them, in both directions; ours are `[N, K / 2]`, the even column in the low half.

compressed-tensors   int32 [N, K / 8]: code + 8, eight columns in a word, the first lowest
Model Optimizer      uint8 [N / 2, K]: two rows in a byte, the even one in the low half
"""

from __future__ import annotations

import torch

from passes.nibbles import pack, unpack
from qcompile.checkpoint.formats.base import Get
from qcompile.errors import CheckpointError

__all__ = ["as_row_pairs", "as_words", "from_row_pairs", "from_words", "reading"]

_SIGN = 0x88  # flips the highest bit of both codes of a byte, which adds 8


def as_words(codes: torch.Tensor) -> torch.Tensor:
    """As compressed-tensors packs them."""
    return (codes ^ _SIGN).contiguous().view(torch.int32)


def from_words(words: torch.Tensor) -> torch.Tensor:
    return words.contiguous().view(torch.uint8) ^ _SIGN


def as_row_pairs(codes: torch.Tensor) -> torch.Tensor:
    """As Model Optimizer packs them. The rows have to be even in number."""
    rows = unpack(codes)
    return rows[::2] | rows[1::2] << 4


def from_row_pairs(pairs: torch.Tensor) -> torch.Tensor:
    return pack(torch.stack([pairs & 15, pairs >> 4], 1).flatten(0, 1))


def reading(get: Get, name: str, shape: tuple[int, int], *, words: bool) -> Get:
    """`get` with the tensor called `name` unpacked. Raises CheckpointError for one of another dtype or shape.

    Args:
        shape: `[N, K]` of the weight. words: compressed-tensors packed it, and not Model Optimizer.
    """
    rows, columns = shape
    dtype, sizes = (torch.int32, [rows, columns // 8]) if words else (torch.uint8, [rows // 2, columns])

    def found(key: str) -> torch.Tensor:
        tensor = get(key)
        if key != name:
            return tensor
        if (tensor.dtype, list(tensor.shape)) != (dtype, sizes):
            raise CheckpointError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, expected"
                f" {str(dtype).removeprefix('torch.')} {sizes} for an INT4 weight [{rows}, {columns}]"
            )
        return from_words(tensor) if words else from_row_pairs(tensor)

    return found
