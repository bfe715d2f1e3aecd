"""What tests of our passes share beside `passes.testing`: small models, and Q/DQ in their graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from passes.formats import FP8, Format
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import Site, find_sites


def export(module: nn.Module, *args: Any, dynamic_shapes: Any = None, **kwargs: Any) -> ExportedProgram:
    """`module` as a functional ATen program with linear layers and attention kept whole."""
    with torch.no_grad():
        program = torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        return program.run_decompositions({})


def scale_of(tensor: Tensor, fmt: Format = FP8, *, per_channel: bool = False) -> Tensor:
    """amax / max of a tensor, or of each row `[N, 1]` of a matrix."""
    amax = tensor.abs().amax(dim=1, keepdim=True) if per_channel else tensor.abs().amax()
    return amax.float() / fmt.max


def insert(gm: GraphModule, scales: Mapping[str, Tensor] | Callable[[Site], Tensor | None], fmt: Format = FP8) -> None:
    """Q/DQ in `fmt` at the sites that `scales` names (by operand, or full name) or gives a scale for."""
    chosen = {}
    for site in find_sites(gm):
        scale = scales(site) if callable(scales) else scales.get(site.name, scales.get(site.operand))
        if scale is not None:
            chosen[site] = Quantizer(fmt, scale)
    InsertQdq(chosen)(gm)


class Mlp(nn.Module):
    """Two linear layers with a residual."""

    def __init__(self, width: int = 8, hidden: int = 16, *, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Attention(nn.Module):
    """Scaled dot-product attention with projections: `[B, S, H * D]` -> `[B, H, S, D]`."""

    def __init__(self, heads: int = 2, width: int = 8, kv_heads: int | None = None, **options: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width, self.options = heads, kv_heads or heads, width, options
        self.q_proj = nn.Linear(heads * width, heads * width)
        self.k_proj = nn.Linear(heads * width, self.kv_heads * width, bias=False)
        self.v_proj = nn.Linear(heads * width, self.kv_heads * width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(*x.shape[:2], heads, self.width).transpose(1, 2)

        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = split(q, self.heads), split(k, self.kv_heads), split(v, self.kv_heads)
        grouped = {"enable_gqa": True} if self.kv_heads != self.heads else {}
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, **grouped, **self.options)
