"""What a program returns that carries its state. Saved programs name it, so it is registered with the operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

__all__ = ["Carried"]


class Carried(NamedTuple):
    """What a program gives back that carries its state.

    Attributes:
        outputs: what the model returns. state: path of a buffer, or name of an input -> what is written to it, for the
            next call.
    """

    outputs: Any
    state: dict[str, torch.Tensor]


pytree.register_pytree_node(
    Carried,
    lambda carried: (list(carried), None),
    lambda parts, _: Carried(*parts),
    serialized_type_name="qcompile.Carried",
    flatten_with_keys_fn=lambda carried: ([*zip(map(pytree.GetAttrKey, Carried._fields), carried, strict=True)], None),
)
