"""More convolutional networks in plain PyTorch: ConvNeXt, DeepLab and a detector."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.convnets import ResNet, bottleneck, conv


class ChannelsFirstNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return result


class ConvNextBlock(nn.Module):
    """A depthwise 7x7 convolution, then an MLP over the channels of each pixel, times a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        inner = self.gamma * self.down(F.gelu(self.up(inner)))
        result: Tensor = x + inner.permute(0, 3, 1, 2)
        return result


class ConvNext(nn.Module):
    """Patches of 4x4, then blocks, with patches of 2x2 between the stages."""

    def __init__(self, depths: tuple[int, ...] = (3, 3, 9, 3), widths: tuple[int, ...] = (96, 192, 384, 768)) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=4), ChannelsFirstNorm(widths[0])]
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if index:
                before = widths[index - 1]
                layers += [ChannelsFirstNorm(before), nn.Conv2d(before, width, 2, stride=2)]
            layers += [ConvNextBlock(width) for _ in range(depth)]
        self.features, self.norm = nn.Sequential(*layers), nn.LayerNorm(widths[-1])
        self.classifier = nn.Linear(widths[-1], 100)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.norm(self.features(x).mean((2, 3))))
        return result


class DeepLab(nn.Module):
    """A backbone, a pyramid of dilated convolutions beside a pooled branch, and logits at the size of the image."""

    def __init__(self, classes: int = 21, width: int = 64) -> None:
        super().__init__()
        backbone = ResNet(partial(bottleneck, wider=2), (1, 1), width, wider=2)
        self.backbone, inputs = nn.Sequential(backbone.stem, backbone.layers), 4 * width
        dilated = (conv(inputs, width, 3, dilation=rate) for rate in (6, 12, 18))
        self.branches = nn.ModuleList([conv(inputs, width), *dilated])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(inputs, width))
        self.project = nn.Sequential(conv(5 * width, width), nn.Dropout(0.5), conv(width, width, 3))
        self.predict = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        pooled = F.interpolate(self.pooled(features), size=features.shape[-2:], mode="bilinear", align_corners=False)
        joined = torch.cat([*(branch(features) for branch in self.branches), pooled], 1)
        result = self.predict(self.project(joined))
        upscaled: Tensor = F.interpolate(result, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return upscaled


class Split(nn.Module):
    """YOLO's block: half of the channels go through residual 3x3 pairs, and all are joined."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1) -> None:
        super().__init__()
        self.enter, half = conv(inputs, outputs, 1, nn.SiLU), outputs // 2
        pairs = (nn.Sequential(conv(half, half, 3, nn.SiLU), conv(half, half, 3, nn.SiLU)) for _ in range(depth))
        self.pairs = nn.ModuleList(pairs)
        self.leave = conv((2 + depth) * half, outputs, 1, nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for pair in self.pairs:
            parts.append(parts[-1] + pair(parts[-1]))
        result: Tensor = self.leave(torch.cat(parts, 1))
        return result


class Detector(nn.Module):
    """A YOLO-like network: three scales, joined from coarse to fine, and a head with boxes and classes on each."""

    def __init__(self, width: int = 16, classes: int = 8) -> None:
        super().__init__()
        sizes = [2 * width, 4 * width, 8 * width]
        down = partial(conv, kernel=3, act=nn.SiLU, stride=2)
        self.stem = nn.Sequential(down(3, width), down(width, 2 * width), Split(2 * width, 2 * width))
        self.stages = nn.ModuleList(
            nn.Sequential(down(before, size), Split(size, size))
            for before, size in zip([2 * width, *sizes[:-1]], sizes, strict=True)
        )
        self.joins = nn.ModuleList(Split(small + large, small) for small, large in itertools.pairwise(sizes))
        self.heads = nn.ModuleList(
            nn.Sequential(conv(size, size, 3, nn.SiLU), nn.Conv2d(size, 4 + classes, 1)) for size in sizes
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, levels = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        for index in (1, 0):
            finer = F.interpolate(levels[index + 1], scale_factor=2.0, mode="nearest")
            levels[index] = self.joins[index](torch.cat([levels[index], finer], 1))
        return tuple(head(level) for head, level in zip(self.heads, levels, strict=True))
