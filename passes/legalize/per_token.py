"""Per-token dynamic quantization with a constant scale inside."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant
from passes.formats import FP8, FP8_PER_TOKEN
from passes.graph import Emitter, aten, calls, dtype, is_call, module_path
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE


class PerTokenToStatic(Pass):
    """Divide each token by its amax, quantize the quotient with a constant, and multiply the product by the amax.

    Before:
        q, s = dynamic_quantize(x, format=fp8_per_token)        # s[..., 1] = amax(|x|) / 448
        y = linear(dequantize(q, s), w, bias)
    After:
        a = clamp_min(amax(abs(x), -1, keepdim), eps)
        y = add(mul(linear(dequantize(quantize(div(x, a), 1/448), 1/448), w), a), bias)

    Requires: weights in their linear layers (before `StoreWeightsTransposed`).
    Ensures: the same codes up to the rounding of `x / a` in the compute dtype.
    Declines when: something else than linear layers reads the dequantized tensor.
    Why: TensorRT has no FP8 GEMM with a scale that is computed at run time, and this form is one, in three kernels that
        join the norm before it (a scale of 1 and quotients up to 448 would overflow float16).
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, DEQUANTIZE):
            if node.kwargs["format"] != FP8_PER_TOKEN.name:
                continue
            readers = list(node.users)
            if not all(is_call(user, aten.linear.default, BATCHED_LINEAR) and user.args[0] is node for user in readers):
                self.decline("a per-token quantized tensor is read by something else than linear layers", node)
                continue
            self._rewrite(gm, node, readers)
            self.fire()

    def _rewrite(self, gm: GraphModule, node: Node, readers: list[Node]) -> None:
        dynamic = node.args[0].args[0]  # type: ignore[union-attr]
        assert isinstance(dynamic, Node) and dynamic.target is DYNAMIC_QUANTIZE
        x = dynamic.args[0]
        assert isinstance(x, Node)
        emit = Emitter(dynamic)
        prefix = f"{module_path(dynamic)}." if module_path(dynamic) else ""
        # the smallest normal float16: below it the quotient itself would overflow
        tiny = torch.tensor(torch.finfo(torch.float16).tiny, dtype=dtype(x))
        largest = emit(aten.amax.default, emit(aten.abs.default, x), [-1], True)
        amax = emit(aten.maximum.default, largest, add_constant(gm, f"{prefix}least_amax", tiny, dynamic))
        scaled = emit(aten.div.Tensor, x, amax)
        scale = add_constant(gm, f"{prefix}input_scale", torch.tensor(1 / FP8.max, dtype=dtype(x)), dynamic)
        codes = emit(QUANTIZE, scaled, scale, format=FP8.name)
        static = emit(DEQUANTIZE, codes, scale, format=FP8.name, dtype=dtype(x))
        for linear in readers:
            after = Emitter(linear)
            assert callable(linear.target)
            product = after(linear.target, static, linear.args[1])
            result = after(aten.mul.Tensor, product, amax)
            if len(linear.args) > 2 and linear.args[2] is not None:
                bias = linear.args[2]
                if linear.target is BATCHED_LINEAR:  # [E, N], for [E, M, N]
                    bias = after(aten.unsqueeze.default, bias, 1)
                result = after(aten.add.Tensor, result, bias)
            linear.replace_all_uses_with(result)
