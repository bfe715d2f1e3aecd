"""Convolutions that torchao's `quantize_` worked on: FP8 weights `[O, C, ...]`, inputs with a measured scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from passes.formats import FP8
from qcompile.errors import CaptureError
from qcompile.schemes.layer import QuantizedLinear, QuantizedWeight
from qcompile.schemes.scheme import Scheme

__all__ = ["KINDS", "QuantizedConvolution", "convolution_of"]

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class QuantizedConvolution(QuantizedLinear):
    """A convolution on codes through the operators of the IR.

    Args:
        like: the layer that says its strides, padding, dilation and groups.
    """

    def __init__(self, weight: QuantizedWeight, like: Any) -> None:
        super().__init__(weight, None if like.bias is None else like.bias.detach(), like.weight.dtype)
        self.options = (like.stride, like.padding, like.dilation, like.groups)
        self.mode, self.around = like.padding_mode, _around(like)
        if self.mode != "zeros":  # then torch pads first, and the convolution does not
            self.options = (like.stride, 0, like.dilation, like.groups)
        self.convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self.codes.ndim - 3]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, ...]` -> `[N, O, ...]`."""
        if self.mode != "zeros":
            x = nn.functional.pad(x, self.around, mode=self.mode)
        return self.convolve(self._quantized(x), self._dequantized(x.dtype), self.bias, *self.options)


def _around(like: Any) -> list[int]:
    """How many elements stand before and behind each axis, the last first, as `pad` wants it."""
    sizes: list[int] = []
    for axis in reversed(range(len(like.kernel_size))):
        if isinstance(like.padding, str):
            total = like.dilation[axis] * (like.kernel_size[axis] - 1) if like.padding == "same" else 0
            sizes += [total // 2, total - total // 2]
        else:
            sizes += [like.padding[axis]] * 2
    return sizes


def convolution_of(layer: Any, name: str) -> QuantizedConvolution:
    """The convolution called `name` in the operators of the IR.

    Raises:
        CaptureError: names the layer, and what its weight is other than FP8 with one scale.
    """
    data = layer.weight.data
    kind = type(data).__name__
    if kind != "Float8Tensor" or data.qdata.dtype != torch.float8_e4m3fn or data.scale.numel() != 1:
        raise CaptureError(
            f"{name}: a convolution with torchao's {kind} of scales {tuple(data.scale.shape)}; qcompile reads those of"
            " Float8DynamicActivationFloat8WeightConfig, in float8_e4m3fn with one scale for the weight"
        )
    options = data.act_quant_kwargs
    if options is None or type(options.granularity).__name__ != "PerTensor":
        how = "not quantized" if options is None else f"quantized by {options.granularity}"
        raise CaptureError(
            f"{name}: a convolution whose input is {how}; qcompile reads one scale for the input: PerTensor"
        )
    if options.hp_value_lb is not None or options.hp_value_ub is not None:
        raise CaptureError(f"{name}: bounds on the amax of activations (activation_value_lb, _ub) are not supported")
    scale = data.scale.detach().float().reshape(())
    return QuantizedConvolution(QuantizedWeight(Scheme(FP8, FP8, measured=True), data.qdata, scale), layer)
