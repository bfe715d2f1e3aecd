"""The arguments of `aten.scaled_dot_product_attention` by name, and how to put another one in its place.

The normal form of attention is `scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=, enable_gqa=)` with
q `[B, H, Sq, D]`, k and v `[B, Hkv, Sk, D]`, and a mask that broadcasts to `[B, H, Sq, Sk]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from passes.graph import Emitter, argument, aten, shape

__all__ = ["HIDDEN", "HIDDEN_ROUNDED", "SDPA", "SOFTMAXES", "Attention", "attention_scale", "fully_masked"]

SDPA = aten.scaled_dot_product_attention.default
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
HIDDEN = -1e4  # adding this or less to a score leaves a probability that is zero in every dtype
HIDDEN_ROUNDED = -9984.0  # what that is in bfloat16: the limit for masks that may have been rounded


@dataclass
class Attention:
    """What one attention computes: `softmax(scale * q k^T + mask) v`."""

    q: Node
    k: Node
    v: Node
    mask: Node | None = None
    dropout: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @classmethod
    def of(cls, node: Node) -> Attention:
        """The arguments of the call `node`."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        return cls(*(argument(node, name) for name in names))

    def emit(self, emit: Emitter) -> Node:
        """A call with these arguments; those that follow is_causal only if they are not the default."""
        options = {"scale": self.scale} if self.scale is not None else {}
        if self.enable_gqa:
            options["enable_gqa"] = True
        return emit(SDPA, self.q, self.k, self.v, self.mask, self.dropout, self.is_causal, **options)

    def replace(self, node: Node) -> Node:
        """Put a call with these arguments in the place of `node`, which computes the same.

        Its output can lie in memory otherwise, as that depends on the kernel: no `view` may follow (`ViewsToReshape`).
        """
        new = self.emit(Emitter(before=node))
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
        return new


def attention_scale(node: Node) -> float:
    """The factor that an SDPA call multiplies its scores by: 1/sqrt(head dimension) unless it says another."""
    scale = argument(node, "scale")
    assert isinstance(node.args[0], Node)
    return float(scale) if scale is not None else float(shape(node.args[0])[-1]) ** -0.5


def fully_masked(mask: torch.Tensor) -> torch.Tensor:
    """Which queries `mask` `[..., Sq, Sk]`, boolean or added to the scores, hides every key from: `[..., Sq, 1]`."""
    hidden = mask.logical_not() if mask.dtype is torch.bool else mask <= HIDDEN_ROUNDED
    return hidden.all(-1, keepdim=True)
