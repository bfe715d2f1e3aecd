"""Products that oneDNN computes: `qcompile::onednn_linear` in float32, whatever BLAS torch was built with, and
`qcompile::onednn_convolution` of INT8 codes."""

from __future__ import annotations

from typing import Any

import torch

_LIBRARY = torch.library.Library("qcompile", "FRAGMENT")
_LIBRARY.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
_LIBRARY.define(
    "onednn_convolution(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, int[] stride,"
    " int[] padding, int[] dilation, int groups) -> Tensor"
)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`aten.linear` in oneDNN: x `[..., K]`, weight `[N, K]`, bias `[N]`, all float32.

    An operator of its own, as Inductor takes `mkldnn._linear_pointwise` only with a weight that is a constant of the
    compiled code, and ours comes from codes at each call.
    """
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return result


@torch.library.register_fake("qcompile::onednn_linear", lib=_LIBRARY)
def _onednn_linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("onednn_linear", onednn_linear, "CPU")
ONEDNN_LINEAR = torch.ops.qcompile.onednn_linear.default


def onednn_convolution(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> torch.Tensor:
    """A convolution of INT8 codes `[N, C, ...]`, with one `scale`, and `[O, C / groups, ...]`, with one for each O.

    Sums are integers; they are scaled, and the float32 `bias` added, in float32. oneDNN takes unsigned inputs only: the
    codes go up by 128, and so does what they are padded with. It lays the weight out for itself in each call, as the
    codes are all that a program stores; that takes less than to dequantize them.
    """
    if not codes.numel():
        return _empty_like_result(codes, weight, stride, padding, dilation)
    spread = codes.ndim == 3  # oneDNN has it in two dimensions
    if spread:
        codes, weight = codes.unsqueeze(2), weight.unsqueeze(2)
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    step, ops, options = float(scale), torch.ops.onednn, (stride, padding, dilation, groups)
    packed = ops.qconv_prepack(weight, weight_scale, step, 128, *options)
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32)
    convolve = ops.qconv3d_pointwise if codes.ndim == 5 else ops.qconv2d_pointwise
    shifted = codes.view(torch.uint8) ^ 128
    operands = (shifted, step, 128, packed, weight_scale, zeros, bias, *options)
    result: torch.Tensor = convolve(*operands, 1.0, 0, torch.float32, "none", [], "")
    return (result.squeeze(2) if spread else result).contiguous()


def _empty_like_result(
    codes: torch.Tensor,
    weight: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    sizes = [codes.shape[0], weight.shape[0]]
    for size, taps, *step in zip(codes.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        sizes.append((size + 2 * step[1] - step[2] * (taps - 1) - 1) // step[0] + 1)
    return torch.empty(sizes, dtype=torch.float32, device=codes.device)


@torch.library.register_fake("qcompile::onednn_convolution", lib=_LIBRARY)
def _onednn_convolution_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    *geometry: Any,
) -> torch.Tensor:
    stride, padding, dilation, _ = geometry
    return _empty_like_result(codes, weight, stride, padding, dilation)


_LIBRARY.impl("onednn_convolution", onednn_convolution, "CPU")
ONEDNN_CONVOLUTION = torch.ops.qcompile.onednn_convolution.default
