"""What stops torch's own transformer layers from being captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qcompile.compat.torch import causal_test


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Within the body `nn.Transformer` and its layers run without a test of what is in their masks, and part by part.

    Without an `is_causal` they read the values of a mask to find out whether it is causal, which a graph cannot. Taken
    for a mask like any other it gives the same result; `NormalizeAttentionMask` recognises it where it is known. And
    what eval mode calls, one operator for a layer and nested tensors for padding, has no linear layers to be found.
    """
    with causal_test(_is_said_to_be_causal):
        yield


def _is_said_to_be_causal(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True
