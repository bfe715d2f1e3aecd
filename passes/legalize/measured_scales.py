"""Scales that are measured at run time, for each token or for the tensor, become constants."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant, constant
from passes.formats import FP8, FP8_PER_TOKEN, INT8, INT8_PER_TOKEN, NVFP4, get_format
from passes.graph import Emitter, argument, aten, calls, dtype, is_call, name_in_module, shape
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, least_amax
from passes.pairs import constant_pair, measured_by

# What is measured -> the format with the constant scale that takes its place.
_CONSTANT = {FP8_PER_TOKEN: FP8, INT8_PER_TOKEN: INT8, FP8: FP8, INT8: INT8, NVFP4: NVFP4}
_LAYERS = (aten.linear.default, BATCHED_LINEAR, aten.convolution.default)


class MeasuredToConstant(Pass):
    """Divide by what is measured, quantize the quotient with a constant, and multiply the product by what was measured.

    Before:
        q, s = dynamic_quantize(x, None, format=fp8_per_token)      # s[..., 1] = amax(|x|) / 448
        y = linear(dequantize(q, s), w, bias)
    After:
        a = maximum(amax(abs(x), -1, keepdim), least)
        y = add(mul(linear(dequantize(quantize(div(x, a), 1/448), 1/448), w), a), bias)

    Before another reader (the output quantizer of a norm, in models of other tools):
        z = avg_pool1d(dequantize(q, s), 2)
    After:
        z = avg_pool1d(mul(dequantize(quantize(div(x, a), 1/448), 1/448), a), 2)

    The same for one scale for the tensor, with a scalar `a`: FP8, INT8 (1/127), and the global scale of NVFP4 where
    that is computed at run time, which becomes 1/2688. So a convolution is rewritten, too.

    Requires: weights in their layers (before `StoreWeightsTransposed`).
    Ensures: the same codes up to the rounding of `x / a` in the compute dtype.
    Declines when: never.
    Why: TensorRT has no FP8 GEMM with a scale that is computed at run time, and this form is one, in three kernels that
        join the norm before it (a scale of 1 and quotients up to 448 would overflow float16).
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, DEQUANTIZE):
            dynamic = _measured(gm, node)
            if dynamic is None:
                continue
            self._rewrite(gm, node, dynamic)
            self.fire()

    def _rewrite(self, gm: GraphModule, node: Node, dynamic: Node) -> None:
        fmt = get_format(str(node.kwargs["format"]))
        static, x = _CONSTANT[fmt], dynamic.args[0]
        assert isinstance(x, Node)
        emit = Emitter(dynamic)
        floor = torch.tensor(least_amax(dtype(x)), dtype=dtype(x))
        over = ([-1], True) if fmt.block == (None,) else (list(range(len(shape(x)))),)
        largest = emit(aten.amax.default, emit(aten.abs.default, x), *over)
        least = add_constant(gm, name_in_module(dynamic, "least_amax"), floor, dynamic)
        amax = emit(aten.maximum.default, largest, least)
        scaled = emit(aten.div.Tensor, x, amax)
        scale = torch.tensor(1 / static.global_max, dtype=torch.float32 if static.scale else dtype(x))
        source = constant_pair(gm, scaled, scale, static, name_in_module(dynamic, "input_scale"), emit)
        layers = [user for user in node.users if _commutes(user, node, amax)]
        if len(layers) < len(node.users):
            values = emit(aten.mul.Tensor, source, amax)
            node.replace_all_uses_with(values, delete_user_cb=lambda user: user not in layers)
        for layer in layers:
            _multiply_after(layer, source, amax)


def _measured(gm: GraphModule, node: Node) -> Node | None:
    """The dynamic quantize that `node` dequantizes, if it measures a scale for each token or for the tensor."""
    dynamic = measured_by(node)
    if dynamic is None or get_format(str(node.kwargs["format"])) not in _CONSTANT:
        return None
    return dynamic if constant(gm, dynamic.args[1]) is None else None


def _commutes(layer: Node, x: Node, amax: Node) -> bool:
    """Whether `layer` makes of `x * amax` what it makes of `x`, times `amax`: a convolution adds over tokens."""
    if not is_call(layer, *_LAYERS) or layer.args[1] is x:
        return False
    return not is_call(layer, aten.convolution.default) or not shape(amax)


def _multiply_after(layer: Node, source: Node, amax: Node) -> None:
    """Let `layer` read `source`, and multiply its product by `amax` before the bias is added."""
    after = Emitter(layer)
    assert callable(layer.target)
    bias, options = argument(layer, "bias"), layer.args[3:]  # of a convolution, which has to say that it has no bias
    product = after(layer.target, source, layer.args[1], *((None, *options) if options else ()))
    result = after(aten.mul.Tensor, product, amax)
    if isinstance(bias, Node):
        if layer.target is BATCHED_LINEAR:  # [E, N], for [E, M, N]
            bias = after(aten.unsqueeze.default, bias, 1)
        elif options:  # [O], for [N, O, ...]
            bias = after(aten.reshape.default, bias, [-1, *[1] * (len(shape(layer)) - 2)])
        result = after(aten.add.Tensor, result, bias)
    layer.replace_all_uses_with(result)
