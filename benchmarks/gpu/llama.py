"""Decoder layers of the shape of Llama 3.1 8B, in plain torch: a whole prompt, or one token after a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu.models import split_heads


@dataclass(frozen=True)
class LlamaSize:
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    layers: int
    theta: float = 500_000.0

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


LLAMA_8B = LlamaSize(hidden=4096, heads=32, kv_heads=8, mlp=14336, layers=4)


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions: causal over a prompt, or one token over a cache."""

    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.heads, self.kv_heads = size.heads, size.kv_heads
        self.q_proj = nn.Linear(size.hidden, size.heads * size.head_size, bias=False)
        self.k_proj = nn.Linear(size.hidden, size.kv_heads * size.head_size, bias=False)
        self.v_proj = nn.Linear(size.hidden, size.kv_heads * size.head_size, bias=False)
        self.o_proj = nn.Linear(size.heads * size.head_size, size.hidden, bias=False)

    def forward(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], past: tuple[torch.Tensor, ...] = ()
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output, and k and v of `x`: with a cache (`past`, keys and values) they are the caller's to put there."""
        q = _rotate(split_heads(self.q_proj(x), self.heads), *rotation)
        k = _rotate(split_heads(self.k_proj(x), self.kv_heads), *rotation)
        v = split_heads(self.v_proj(x), self.kv_heads)
        keys, values = past if len(past) else (k, v)
        y = F.scaled_dot_product_attention(q, keys, values, is_causal=not len(past), enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2)), k, v


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class SwiGlu(nn.Module):
    def __init__(self, hidden: int, mlp: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, mlp, bias=False)
        self.up_proj = nn.Linear(hidden, mlp, bias=False)
        self.down_proj = nn.Linear(mlp, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self, size: LlamaSize) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size.hidden, eps=1e-5)
        self.self_attn = LlamaAttention(size)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden, eps=1e-5)
        self.mlp = SwiGlu(size.hidden, size.mlp)

    def forward(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], past: tuple[torch.Tensor, ...] = ()
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, k, v = self.self_attn(self.input_layernorm(x), rotation, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class LlamaLayers(nn.Module):
    """Decoder layers of Llama without embedding and head, at `positions` known in advance.

    `forward(x)` is a prompt: [B, T, hidden] -> [B, T, hidden]. `forward(x, k0, v0, k1, v1, ...)` is one token [B, 1,
    hidden] after a cache ([B, kv_heads, past, head_size] a layer); it returns the token's own k and v, too.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, size: LlamaSize, positions: range) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaLayer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.hidden, eps=1e-5)
        exponents = torch.arange(0, size.head_size, 2, dtype=torch.float32) / size.head_size
        angles = torch.arange(positions.start, positions.stop)[:, None] * size.theta**-exponents
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(self, x: torch.Tensor, *past: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        new: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            x, k, v = layer(x, (self.cos, self.sin), past[2 * index : 2 * index + 2])
            new += [k, v]
        x = self.norm(x)
        return (x, *new) if len(past) else x
