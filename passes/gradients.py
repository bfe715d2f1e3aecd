"""Operators for inference that say so, where without a word gradients would be zero, missing or wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from passes.compat import FakeTensor, below_autograd, in_forward_mode
from passes.errors import QCompileError

__all__ = ["NO_GRADIENT", "refuse_gradients"]

NO_GRADIENT = (
    "a rounded value has no gradient; train the float model, or with the quantization-aware training of another tool,"
    " and quantize the result"
)


def _is_traced(operand: object, forward: bool) -> bool:
    """Whether autograd would want the derivative with respect to `operand`, in `forward` mode or backwards."""
    if not isinstance(operand, torch.Tensor) or isinstance(operand, FakeTensor):
        return False
    backward = operand.requires_grad and torch.is_grad_enabled()
    return backward or (forward and forward_ad.unpack_dual(operand).tangent is not None)


def refuse_gradients(library: torch.library.Library, name: str) -> None:
    """Let operator `name` of `library` raise QCompileError where autograd is on and an operand requires a gradient.

    That is when it is called, not when the gradient is asked for: codes are integers, which carry no gradient that
    could raise later. Fake tensors pass, as who traces decides himself: the back end of torch.compile refuses in
    `backward`.
    """
    operator = getattr(getattr(torch.ops, library.ns), name).default

    def checked(keys: Any, *args: Any, **kwargs: Any) -> Any:
        forward = in_forward_mode()
        if (torch.is_grad_enabled() or forward) and any(_is_traced(operand, forward) for operand in args):
            raise QCompileError(
                f"{library.ns}::{name} is for inference: {NO_GRADIENT}. For results alone, call it under"
                " torch.no_grad()"
            )
        return operator.redispatch(below_autograd(keys), *args, **kwargs)

    library.impl(name, checked, "Autograd", with_keyset=True)
