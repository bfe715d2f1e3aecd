"""Convolutional networks in plain PyTorch, as their papers and torchvision have them, with random weights.

Each part that the published ones have is here: strides, residual adds, depthwise and grouped kernels, squeeze and
excitation, dilation, norms of every kind, and several outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

Act = Callable[[], nn.Module]


def conv(inputs: int, outputs: int, kernel: int = 1, act: Act | None = nn.ReLU, **options: Any) -> nn.Sequential:
    """Convolution, batch norm and activation; zeros around the image keep its size."""
    padding = kernel // 2 * options.get("dilation", 1)
    layers = [nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **options), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Residual(nn.Module):
    """`relu(body(x) + skip(x))`."""

    def __init__(self, body: nn.Module, skip: nn.Module | None) -> None:
        super().__init__()
        self.body, self.skip, self.relu = body, skip or nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.body(x) + self.skip(x))
        return result


def basic(inputs: int, width: int, stride: int = 1, dilation: int = 1) -> Residual:
    """Two 3x3 convolutions, of ResNet-18."""
    body = nn.Sequential(conv(inputs, width, 3, stride=stride, dilation=dilation), conv(width, width, 3, None))
    return Residual(body, conv(inputs, width, 1, None, stride=stride) if (inputs, stride) != (width, 1) else None)


def bottleneck(
    inputs: int, width: int, stride: int = 1, dilation: int = 1, groups: int = 1, wider: int = 4
) -> Residual:
    """1x1, 3x3 and 1x1 convolutions, of ResNet-50; RegNet's with `groups`, and no wider at its end."""
    inner = conv(width, width, 3, stride=stride, dilation=dilation, groups=groups)
    body, outputs = nn.Sequential(conv(inputs, width), inner, conv(width, wider * width, 1, None)), wider * width
    return Residual(body, conv(inputs, outputs, 1, None, stride=stride) if (inputs, stride) != (outputs, 1) else None)


class ResNet(nn.Module):
    """A stem, stages of residual blocks that halve the image, and a head `fc`, which recipes know by this name."""

    def __init__(
        self,
        block: Callable[..., Residual] = basic,
        depths: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        wider: int = 1,
        classes: int = 1000,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem or nn.Sequential(conv(3, width, 7, stride=2), nn.MaxPool2d(3, 2, 1))
        stages, inputs = [], width
        for index, depth in enumerate(depths):
            blocks = []
            for place in range(depth):
                blocks.append(block(inputs, width << index, 2 if index and not place else 1))
                inputs = wider * (width << index)
            stages.append(nn.Sequential(*blocks))
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.layers(self.stem(x)).mean((2, 3)))
        return result


def resnet18(classes: int = 1000) -> ResNet:
    return ResNet(classes=classes)


def resnet50(classes: int = 1000) -> ResNet:
    return ResNet(bottleneck, (3, 4, 6, 3), wider=4, classes=classes)


def regnet() -> ResNet:
    """Stages of grouped 3x3 convolutions, 16 channels a group."""

    def block(inputs: int, width: int, stride: int = 1) -> Residual:
        return bottleneck(inputs, width, stride, groups=width // 16, wider=1)

    return ResNet(block, (1, 2, 2), 32, classes=100, stem=conv(3, 32, 3, stride=2))


class SqueezeExcite(nn.Module):
    """Every channel times a factor that the mean of all decides; factors come of `gate`."""

    def __init__(self, channels: int, squeezed: int, act: Act, gate: Act) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x: Tensor) -> Tensor:
        factors: Tensor = self.gate(self.fc2(self.act(self.fc1(F.adaptive_avg_pool2d(x, 1)))))
        return x * factors


class Inverted(nn.Module):
    """MobileNet's block: wider by 1x1, depthwise, squeeze and excitation, narrower by 1x1."""

    def __init__(
        self, inputs: int, outputs: int, inner: int, kernel: int, stride: int, act: Act, squeezed: int, gate: Act
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv(inputs, inner, 1, act)] if inner != inputs else []
        layers.append(conv(inner, inner, kernel, act, stride=stride, groups=inner))
        layers += [SqueezeExcite(inner, squeezed, nn.ReLU if gate is nn.Hardsigmoid else act, gate)] if squeezed else []
        self.body = nn.Sequential(*layers, conv(inner, outputs, 1, None))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return x + result if self.adds else result


MOBILENET_V3_SMALL = (  # inner, outputs, kernel, stride, squeezed, hard-swish
    (16, 16, 3, 2, 8, False), (72, 24, 3, 2, 0, False), (88, 24, 3, 1, 0, False), (96, 40, 5, 2, 24, True),
    (240, 40, 5, 1, 64, True), (240, 40, 5, 1, 64, True), (120, 48, 5, 1, 32, True), (144, 48, 5, 1, 40, True),
    (288, 96, 5, 2, 72, True), (576, 96, 5, 1, 144, True), (576, 96, 5, 1, 144, True),
)  # fmt: skip
EFFICIENTNET = ((32, 16, 3, 1, 8, True), (96, 24, 3, 2, 4, True), (144, 24, 3, 1, 6, True), (144, 40, 5, 2, 6, True))


class Mobile(nn.Module):
    """MobileNetV3 (hard-swish, hard sigmoid) or EfficientNet (SiLU, sigmoid), of blocks as `rows` has them."""

    def __init__(
        self, rows: Sequence[tuple[int, int, int, int, int, bool]], stem: int, act: Act, gate: Act, last: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv(3, stem, 3, act, stride=2)]
        for inner, outputs, kernel, stride, squeezed, smooth in rows:
            layers.append(Inverted(stem, outputs, inner, kernel, stride, act if smooth else nn.ReLU, squeezed, gate))
            stem = outputs
        self.features = nn.Sequential(*layers, conv(stem, last, 1, act))
        self.classifier = nn.Linear(last, 100)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return result


def mobilenet_v3_small() -> Mobile:
    return Mobile(MOBILENET_V3_SMALL, 16, nn.Hardswish, nn.Hardsigmoid, 576)


def efficientnet() -> Mobile:
    """The first stages of EfficientNet-B0."""
    return Mobile(EFFICIENTNET, 32, nn.SiLU, nn.Sigmoid, 160)
