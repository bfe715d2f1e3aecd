"""Quantizers in front of a max pooling."""

from __future__ import annotations

from torch.fx import GraphModule

from passes.base import Pass
from passes.canonicalize.symmetric import applied_before, quantized_path
from passes.graph import aten, calls, only_user

__all__ = ["QuantizeBehindMaxPool"]

_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)


class QuantizeBehindMaxPool(Pass):
    """Quantize what a max pooling keeps, and not what it reads.

    Before:
        y = max_pool2d(dequantize(quantize(x, s), s), [3, 3], [2, 2])
    After:
        y = dequantize(quantize(max_pool2d(x, [3, 3], [2, 2]), s), s)

    Requires: nothing.
    Ensures: the same values: rounding with one scale keeps the order of numbers.
    Declines when: never; what something else reads, too, and scales that are more than one or measured, stay.
    Why: nvidia-modelopt quantizes what poolings read. Between a convolution and a pooling that is a kernel of its own;
        behind it the quantizer of the next layer is in the same kernel, on a quarter of the elements.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for pool in calls(gm.graph, *_POOLS):
            path = quantized_path(gm, pool.args[0])
            if path and all(only_user(step) is not None for step in path):
                pool.replace_all_uses_with(applied_before(pool, path, pool))
                self.fire()
