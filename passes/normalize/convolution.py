"""Every way to write a convolution becomes `aten.convolution`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, argument, aten, calls, shape

__all__ = ["SPELLINGS", "NormalizeConvolution"]

SPELLINGS = {
    aten.conv1d.default: False,
    aten.conv2d.default: False,
    aten.conv3d.default: False,
    aten.conv1d.padding: False,
    aten.conv2d.padding: False,
    aten.conv3d.padding: False,
    aten.conv_transpose1d.default: True,
    aten.conv_transpose2d.input: True,
    aten.conv_transpose3d.input: True,
    aten._convolution.default: None,  # these say it
    aten.convolution.default: None,
}
"""Operator -> whether it is transposed."""


class NormalizeConvolution(Pass):
    """Rewrite convolutions of one to three dimensions, transposed ones too, with a batch and numbers for the padding.

    Before:
        y = conv2d(x, w, bias, stride=2)                     # also conv1d, conv3d, conv_transpose2d, _convolution
        z = conv1d(x, w, bias, padding="same")               # a kernel of 4: one zero in front, two behind
        u = conv2d(image, w, bias)                           # [C, H, W], no batch
    After:
        y = convolution(x, w, bias, [2, 2], [0, 0], [1, 1], False, [0, 0], 1)
        z = convolution(constant_pad_nd(x, [0, 1]), w, bias, [1], [1], [1], False, [0], 1)
        u = squeeze(convolution(unsqueeze(image, 0), w, bias, ...), 0)

    Requires: nothing.
    Ensures: bit-equal values; stride, padding, dilation and output padding are lists with a number for each dimension.
    Declines when: never.
    Why: quantizers, folds and lowerings then know one form only. Padding by reflection, or of a circle, stands before
        the convolution as it is.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, *SPELLINGS):
            if not _is_neutral(node):
                self._rewrite(node)
                self.fire()

    def _rewrite(self, node: Node) -> None:
        emit = Emitter(node)
        x, weight = argument(node, "input"), argument(node, "weight")
        dims = len(shape(weight)) - 2
        transposed = _is_transposed(node)
        padding = argument(node, "padding")
        stride, dilation, output_padding = (
            _numbers(argument(node, name), dims, default)
            for name, default in (("stride", 1), ("dilation", 1), ("output_padding", 0))
        )
        batched = len(shape(x)) == dims + 2
        x = x if batched else emit(aten.unsqueeze.default, x, 0)
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, shape(weight)[2:], strict=True)]
            padding = [total // 2 for total in totals]
            behind = [number for total in reversed(totals) for number in (0, total % 2)]
            x = emit(aten.constant_pad_nd.default, x, behind) if any(behind) else x
        elif padding == "valid":
            padding = [0] * dims
        padding = _numbers(padding, dims, 0)
        arguments = (argument(node, "bias"), stride, padding, dilation, transposed, output_padding)
        result = emit(aten.convolution.default, x, weight, *arguments, argument(node, "groups"))
        node.replace_all_uses_with(result if batched else emit(aten.squeeze.dim, result, 0))


def _is_transposed(node: Node) -> bool:
    known = SPELLINGS[node.target]  # type: ignore[index]
    return bool(argument(node, "transposed")) if known is None else known


def _is_neutral(node: Node) -> bool:
    if node.target is not aten.convolution.default or node.kwargs:
        return False
    x, weight = node.args[:2]
    assert isinstance(x, Node) and isinstance(weight, Node)
    dims = len(shape(weight)) - 2
    lists: Any = (*node.args[3:6], node.args[7])
    return len(shape(x)) == dims + 2 and all(len(numbers) == dims for numbers in lists)


def _numbers(value: Any, dims: int, default: int) -> list[Any]:
    """One number for each dimension; operators take one for all of them."""
    if value is None:
        return [default] * dims
    numbers = list(value) if isinstance(value, Sequence) else [value]
    return numbers * dims if len(numbers) == 1 else numbers
