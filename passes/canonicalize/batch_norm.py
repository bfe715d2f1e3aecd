"""Batch norms behind quantized convolutions disappear into the scales of their weights."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import add_constant, constant, delete_constant, evaluate_constant, is_constant_expression
from passes.graph import argument, aten, calls, dtype, is_call, name_in_module, only_user, shape
from passes.ir import DEQUANTIZE, QUANTIZE, quantize
from passes.normalize.batch_norm import NORMS, Affine, affine_of, skip_norm
from passes.pairs import store_codes

__all__ = ["FoldBatchNormIntoScales"]


class FoldBatchNormIntoScales(Pass):
    """Multiply what a weight's scale for each channel is by what a batch norm does to that channel.

    Before:
        y = batch_norm(convolution(x, dequantize(quantize(w, s), s), bias), gamma, beta, mean, var)
    After, with f = gamma / sqrt(var + eps):
        y = convolution(x, dequantize(codes, s * |f|), (bias - mean) * f + beta)

    Requires: `NormalizeConvolution` ran.
    Ensures: the codes are those that the quantizer makes of the weight before the fold, negative ones where f is; the
        same values but for rounding, in float64.
    Declines when: the convolution has another reader; its bias is computed at run time; a code that has to change its
        sign is the lowest, which has no positive one; f * s leaves float32. A weight with one scale is not looked at:
        it would get one for each channel, whose convolutions write float32 in TensorRT, where the norm joins the kernel
        that quantizes what is behind.
    Why: other tools quantize convolutions and leave the norms behind them: nvidia-modelopt does.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for norm in calls(gm.graph, *NORMS):
            layer = norm.args[0]
            if not is_call(layer, aten.convolution.default) or not _is_per_channel(layer):  # type: ignore[arg-type]
                continue
            assert isinstance(layer, Node)
            affine = affine_of(gm, norm)
            if affine is None:
                continue
            if reason := _fold(gm, layer, affine):
                self.decline(reason, norm)
                continue
            skip_norm(norm)
            self.fire()


def _is_per_channel(layer: Node) -> bool:
    """Whether the weight is a constant behind quantize and dequantize with a scale for each channel of the results."""
    weight = layer.args[1]
    if argument(layer, "transposed") or not isinstance(weight, Node) or not is_call(weight, DEQUANTIZE):
        return False
    codes, scale = weight.args
    source = codes.args[0] if isinstance(codes, Node) and is_call(codes, QUANTIZE) else None
    sizes = [shape(weight)[0], *[1] * (len(shape(weight)) - 1)]
    return is_constant_expression(source) and is_constant_expression(scale) and list(shape(scale)) == sizes  # type: ignore[arg-type]


def _fold(gm: GraphModule, layer: Node, norm: Affine) -> str | None:
    """Give `layer` the weight and bias that `norm` makes of its own; why not, or None."""
    weight, bias = layer.args[1:3]
    assert isinstance(weight, Node)
    if only_user(layer) is None:
        return "the layer before it has another reader, which wants its values as they are"
    if only_user(weight) is None:
        return "another layer reads the weight before it"
    if bias is not None and not is_constant_expression(bias):
        return "the bias of the layer before it is computed at run time"
    scale = constant(gm, weight.args[1])
    assert scale is not None
    factor = norm.factor.reshape(scale.shape)
    source = weight.args[0].args[0]  # type: ignore[union-attr]
    codes = quantize(evaluate_constant(gm, source), scale, format=str(weight.kwargs["format"]))  # type: ignore[arg-type]
    flips = factor < 0
    if not codes.dtype.is_floating_point and bool(((codes == torch.iinfo(codes.dtype).min) & flips).any()):
        return "its factor is negative for a channel with the lowest code, which has no positive one"
    scales = torch.where(factor == 0, scale.double(), scale.double() * factor.abs()).float()
    if not bool((scales.isfinite() & (scales > 0)).all()):
        return "what the scales of the weight before it become leaves float32"
    signed = torch.where(flips, -codes.float(), codes.float())
    signed = torch.where(factor == 0, 0.0, signed).to(codes.dtype)
    _store(gm, weight, signed, scales)
    known = torch.zeros((), dtype=torch.float64) if bias is None else evaluate_constant(gm, bias).double()  # type: ignore[arg-type]
    fresh = torch.nn.Parameter((known * norm.factor + norm.shift).to(dtype(layer)), requires_grad=False)
    name = str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else name_in_module(layer, "bias")
    layer.update_arg(2, add_constant(gm, name, fresh, layer))
    return None


def _store(gm: GraphModule, weight: Node, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Let the dequantize `weight` read these, under the names that there were."""
    source, old = weight.args
    assert isinstance(source, Node) and isinstance(old, Node)
    name, readers = str(old.target), [user for user in old.users if user not in (source, weight)]
    store_codes(gm, source, codes)
    if not readers:
        weight.update_arg(1, None)
        gm.graph.erase_node(old)
        delete_constant(gm, name)
    weight.update_arg(1, add_constant(gm, name, scales, weight))
