"""A tiny ResNet, whose batch norms have numbers of their own, and what judges import and repair with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LAYERS = ("stem", "block.first", "block.second", "block.skip", "head")


class Block(nn.Module):
    """Two convolutions and one beside them, each with its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.second, self.second_norm = nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.BatchNorm2d(2 * width)
        self.skip, self.skip_norm = nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width)
        self.inner, self.outer = nn.ReLU(), nn.ReLU()  # X86InductorQuantizer takes no module that is called twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(self.first_norm(self.first(x)))
        return self.outer(self.second_norm(self.second(y)) + self.skip_norm(self.skip(x)))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A stem, one block and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        self.block, self.head = Block(width), nn.Linear(2 * width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.relu(self.norm(self.stem(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def resnet(width: int = 16) -> Any:
    torch.manual_seed(0)
    model = ResNet(width).eval().requires_grad_(False)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.running_mean, norm.bias):
                assert values is not None
                nn.init.normal_(values, std=0.2)
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, -1.5, -0.5)
            norm.weight[::2] += 2.0
    return model


def recipe(fmt: str, granularity: str) -> Any:
    """Every weight and input in `fmt`, so that our own file has what a tool's has."""
    return {
        "metadata": {"name": "test", "description": "all layers"},
        "rules": [
            {"quantizer": "*.weight_quantizer", "format": fmt, "granularity": granularity},
            {"quantizer": "*.input_quantizer", "format": fmt},
        ],
    }
