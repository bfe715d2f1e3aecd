"""Results that say so when a gradient is asked for: what is compiled is for inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import FunctionCtx

from passes.gradients import NO_GRADIENT
from qcompile.errors import CompileError


def without_backward(results: Sequence[Any], wanted: Sequence[bool], sources: Sequence[Any]) -> Any:
    """`results`, of which those that are `wanted` raise an error where their gradient is asked for."""
    leaf = next((s for s in sources if isinstance(s, torch.Tensor) and s.requires_grad), None)
    if leaf is None:  # frozen since: not every version of Dynamo compiles again for that
        return results
    pairs = list(zip(results, wanted, strict=True))
    marked = iter(_ForInference.apply(leaf, *(r for r, want in pairs if want)))  # type: ignore[no-untyped-call]
    return tuple(next(marked) if want else r for r, want in pairs)


class _ForInference(torch.autograd.Function):
    """Hands tensors on, and says so when a gradient is asked for."""

    @staticmethod
    def forward(ctx: FunctionCtx, wanting: torch.Tensor, *tensors: torch.Tensor) -> Any:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise CompileError(f"qcompile compiles for inference: {NO_GRADIENT}")
