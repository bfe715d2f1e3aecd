"""`nn.Transformer`, its layers and `nn.MultiheadAttention`: captured part by part, as `qcompile.capture` does.

Dynamo cannot branch on values, and gives up on a whole encoder where torch tests its mask for being causal. Without
gradients torch has one operator for a layer in eval mode, in which no pass finds a linear layer, and which reads the
weights past the quantizers of other tools. In what this back end compiles, and only there, a mask that nothing is said
of counts as one like any other, and that operator is switched off; both give the same result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType

import torch
from torch.backends import mha

from qcompile.compat.torch import original_causal_test


def install(ours: Callable[[], bool]) -> None:
    """Have Dynamo see that test and that switch so.

    Args:
        ours: whether what this thread compiles, or calls, is for this back end.
    """
    test, is_enabled = original_causal_test(), mha.get_fastpath_enabled
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

    @functools.wraps(is_enabled)
    def get_fastpath_enabled() -> bool:
        return not is_ours() and bool(is_enabled())

    mha.get_fastpath_enabled = get_fastpath_enabled  # Dynamo has a rule for torch's own, and takes no other
