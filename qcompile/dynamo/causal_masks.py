"""`nn.Transformer` and its encoders and decoders with a mask: no graph break where torch tests it for being causal.

Dynamo cannot branch on values, and gives up on the whole encoder there. While it compiles for this back end, and only
then, a mask that nothing is said of counts as one like any other, which gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType

import torch
from torch.nn.modules import transformer


def install(ours: Callable[[], bool]) -> None:
    """Have Dynamo see that test so.

    Args:
        ours: whether what this thread compiles is for this back end.
    """
    test = transformer._detect_is_causal_mask
    # for other back ends: Dynamo tells functions apart by their identity
    untouched = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__)

    is_ours: Callable[[], bool] = torch.compiler.assume_constant_result(ours)  # type: ignore[no-untyped-call]

    @torch.compiler.substitute_in_graph(test)
    def _detect_is_causal_mask(
        mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None
    ) -> bool:
        if is_ours():
            return is_causal is True
        return bool(untouched(mask, is_causal, size))
