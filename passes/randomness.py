"""Which operators draw random numbers."""

from __future__ import annotations

import torch
from torch.fx import Node

from passes.graph import argument

__all__ = ["draws"]

_SWITCHES = ("train", "training")
_CHANCES = ("p", "dropout", "dropout_p")


def draws(node: Node) -> bool:
    """Whether the result of `node` differs from call to call: dropout that is switched on, `rand`, `bernoulli`.

    Operators that can draw and were told not to (dropout in eval mode, attention and LSTMs without dropout) do not.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = {arg.name for arg in node.target._schema.arguments}
    # None is a switch that is on: native_dropout
    if any(argument(node, name) is False for name in names.intersection(_SWITCHES)):
        return False
    return all(argument(node, name) != 0 for name in names.intersection(_CHANCES))
