"""What a model computes in, and what its program will."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.fx import GraphModule

from qcompile.errors import QCompileError

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def model_dtype(gm: GraphModule) -> torch.dtype:
    """The floating-point dtype that most of a graph's parameters have; float32 if it has none."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for parameter in gm.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__) if sizes else torch.float32


def compute_dtype(asked: torch.dtype | None, source: torch.dtype) -> torch.dtype:
    """What a program computes in: what was `asked` for, else the model's own half precision, float16 for others."""
    if asked not in (None, *COMPUTE_DTYPES):
        raise QCompileError(f"cannot compute in {asked}; known: {', '.join(map(str, COMPUTE_DTYPES))}")
    return asked or (source if source in (torch.float16, torch.bfloat16) else torch.float16)
