"""Packed Q, K and V in the forms of models: as few kernels as timm's, and no GEMM in half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile

pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")

HEADS, WIDTH, TOKENS = 4, 32, 64
HIDDEN = HEADS * WIDTH
Form = Callable[["Block", Tensor], Sequence[Tensor]]


def heads(*parts: Tensor) -> list[Tensor]:
    """[B,S,H*D] each as [B,H,S,D]."""
    return [part.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for part in parts]


def rotated(block: Block, form: Form, y: Tensor) -> Sequence[Tensor]:
    q, k, v = form(block, y)
    return *(t * block.cos + torch.cat([-t[..., 16:], t[..., :16]], -1) * block.sin for t in (q, k)), v


def grouped(block: Block, y: Tensor) -> Sequence[Tensor]:
    """Phi3: two heads of keys and values for four of queries."""
    q, k, v = heads(*y.split([HIDDEN, 2 * WIDTH, 2 * WIDTH], -1))
    return q, *(t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))


FORMS: dict[str, Form] = {
    "timm": lambda _, y: y.unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0),
    "unbind": lambda _, y: [t.transpose(1, 2) for t in y.unflatten(-1, (3, HEADS, WIDTH)).unbind(2)],
    "MPT": lambda _, y: heads(*y.chunk(3, -1)),
    "GPT-2": lambda _, y: heads(*y.split(HIDDEN, 2)),
    "slices": lambda _, y: heads(y[..., :HIDDEN], y[..., HIDDEN : 2 * HIDDEN], y[..., 2 * HIDDEN :]),
    "BLOOM": lambda _, y: [y.unflatten(-1, (HEADS, 3, WIDTH))[..., i, :].transpose(1, 2) for i in range(3)],
    "GPT-NeoX": lambda _, y: y.unflatten(-1, (HEADS, 3 * WIDTH)).transpose(1, 2).chunk(3, -1),
    "ModernBERT": lambda _, y: y.unflatten(-1, (3, HEADS, WIDTH)).transpose(3, 1).unbind(2),
    "Phi3": grouped,
    "GPT-2, flat": lambda _, y: heads(*y.split(HIDDEN, 2)),
    "timm, no bias": lambda block, y: FORMS["timm"](block, y),
    "MPT, no bias": lambda block, y: FORMS["MPT"](block, y),
    "unbind, rotary": lambda block, y: rotated(block, FORMS["unbind"], y),
    "MPT, rotary": lambda block, y: rotated(block, FORMS["MPT"], y),
    "Phi3, rotary": lambda block, y: rotated(block, grouped, y),
}


class Block(nn.Module):
    """A block of a transformer whose `form` makes queries, keys and values of one linear layer."""

    cos: Tensor
    sin: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        self.form = FORMS[name]
        self.norm, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.flat = "flat" in name
        self.qkv = nn.Linear(HIDDEN, 2 * HIDDEN if "Phi3" in name else 3 * HIDDEN, bias="no bias" not in name)
        self.proj, self.up, self.down = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 256), nn.Linear(256, HIDDEN)
        angles = torch.arange(TOKENS)[:, None] * torch.rand(16).repeat(2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        packed = self.norm(x).reshape(-1, HIDDEN) if self.flat else self.norm(x)
        q, k, v = self.form(self, self.qkv(packed).reshape(*x.shape[:2], -1))
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@cache
def engine(name: str, recipe: str, target: str, folder: Path) -> qcompile.EngineReport:
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(name), Block(name)).eval(), torch.randn(1, TOKENS, HIDDEN)
    program = qcompile.quantize(model, (x,), recipe=recipe, calibration=[(x,)], progress=False)
    qcompile.export_onnx(program, folder / "m.onnx", target="tensorrt")
    return qcompile.build_engine(folder / "m.onnx", target=target, progress=False)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("name", [name for name in FORMS if name != "timm"])
@pytest.mark.parametrize(
    ("recipe", "target"), [("fp8", "sm89"), ("int8", "sm89"), ("fp8", "sm120"), ("int8", "sm120"), ("nvfp4", "sm120")]
)
def test_each_is_as_good_as_the_best(
    name: str, recipe: str, target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    best, found = engine("timm", recipe, target, folder.parent), engine(name, recipe, target, folder)
    assert found.kernels <= best.kernels
    assert found.gemms == best.gemms and not found.gemms["half"]
    assert found.attention.fused == found.attention.total == 2
