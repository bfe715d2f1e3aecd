"""`nn.TransformerEncoderLayer` in eval mode without gradients: torch calls one operator for the whole layer.

Here it is written out, so that passes find its linear layers and its attention.
"""

from __future__ import annotations

import torch
from torch.nn import functional

ENCODER_LAYER = torch._transformer_encoder_layer_fwd


def encoder_layer(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: torch.Tensor,
    norm_bias_1: torch.Tensor,
    norm_weight_2: torch.Tensor,
    norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor,
    ffn_bias_1: torch.Tensor,
    ffn_weight_2: torch.Tensor,
    ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """What `torch._transformer_encoder_layer_fwd` computes, with its arguments.

    Args:
        src: `[B, S, embed_dim]`.
        mask: of the attention, `[S, S]` or, if `mask_type` is 2, `[B, num_heads, S, S]`; of keys, `[B, S]`, if that is
            1. What is not zero is hidden, also in a mask of floating point.
    """
    visible = None
    if mask is not None:
        visible = mask.logical_not()
        visible = visible[:, None, None] if mask_type == 1 else visible

    def attention(x: torch.Tensor) -> torch.Tensor:
        parts = functional.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        q, k, v = (part.reshape(*part.shape[:2], num_heads, -1).transpose(1, 2) for part in parts)
        heads = functional.scaled_dot_product_attention(q, k, v, visible)
        return functional.linear(heads.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        hidden = functional.linear(x, ffn_weight_1, ffn_bias_1)
        hidden = functional.gelu(hidden) if use_gelu else functional.relu(hidden)
        return functional.linear(hidden, ffn_weight_2, ffn_bias_2)

    def norm_1(x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attention(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attention(src))
    return norm_2(x + feed_forward(x))
