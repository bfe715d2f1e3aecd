"""Models in plain torch: a vision transformer and blocks as of DiT, and the random weights of all models.

Weights are random, but of the size that training gives them: every layer keeps the variance of what it reads, so that
no layer is drowned in the residual stream, and biases and norms differ from zero and one, so that a lost one is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ViTSize:
    """`image` and `patch` are sides in pixels."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    image: int = 224
    patch: int = 16
    classes: int = 1000

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1


@dataclass(frozen=True)
class DiTSize:
    hidden: int
    heads: int
    mlp: int
    layers: int


VIT_BASE = ViTSize(hidden=768, layers=12, heads=12, mlp=3072)
VIT_LARGE = ViTSize(hidden=1024, layers=24, heads=16, mlp=4096)
DIT_XL = DiTSize(hidden=1152, heads=16, mlp=4608, layers=4)


def split_heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention over all tokens, with one linear layer for q, k and v."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden: int, mlp: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, mlp)
        self.fc2 = nn.Linear(mlp, hidden)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class ViTBlock(nn.Module):
    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.hidden, eps=1e-6)
        self.attn = Attention(size.hidden, size.heads)
        self.norm2 = nn.LayerNorm(size.hidden, eps=1e-6)
        self.mlp = Mlp(size.hidden, size.mlp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., 2021): images [B, 3, H, W] -> logits [B, classes]."""

    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, size.hidden, size.patch, size.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.hidden))
        self.pos_embed = nn.Parameter(torch.zeros(1, size.tokens, size.hidden))
        self.blocks = nn.ModuleList(ViTBlock(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.hidden, eps=1e-6)
        self.head = nn.Linear(size.hidden, size.classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class DiTBlock(nn.Module):
    """A block of DiT with adaLN-Zero (Peebles and Xie, 2023)."""

    def __init__(self, size: DiTSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.hidden, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(size.hidden, size.heads)
        self.norm2 = nn.LayerNorm(size.hidden, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(size.hidden, size.mlp, approximate="tanh")
        self.adaLN_modulation = nn.Linear(size.hidden, 6 * size.hidden)

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        modulation = self.adaLN_modulation(F.silu(conditioning))[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiTBlocks(nn.Module):
    """Tokens [B, T, hidden] and conditioning [B, hidden] -> tokens."""

    def __init__(self, size: DiTSize) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(size) for _ in range(size.layers))

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, conditioning)
        return x


def build(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module that `make` gives, for inference on `device`, with the same random weights each time."""
    with torch.device(device):
        module = make().eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            if parameter.ndim > 1:
                is_table = name.endswith(("_token", "_embed"))
                parameter.copy_(noise if is_table else noise * (parameter.numel() / len(parameter)) ** -0.5)
            else:
                parameter.copy_(0.1 * noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return module.to(dtype)
