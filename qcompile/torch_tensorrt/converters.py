"""How the IR operators become TensorRT layers: converters in Torch-TensorRT's registry.

Codes are constants of their own type, FP8, FP4 or INT8, in front of a dequantize layer: nothing is multiplied out.
This module imports torch_tensorrt, so it is itself imported by `environment.require_torch_tensorrt` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorrt as trt  # torch_tensorrt puts tensorrt_rtx under this name where it is built on that
import torch
from torch.fx import Node
from torch_tensorrt.dynamo.conversion import ConversionContext, ConverterPriority, dynamo_tensorrt_converter, impl
from torch_tensorrt.dynamo.conversion.converter_utils import get_trt_tensor, prepend_ones

from passes.formats import get_format
from passes.graph import aten, val
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.sdpa import SDPA
from qcompile.compat.torch_tensorrt import dtype_of

OURS = "qcompile"
"""Key of `node.meta` in the graphs that this package lowers."""

_CODES = {torch.float8_e4m3fn: trt.DataType.FP8, torch.int8: trt.DataType.INT8, torch.uint8: trt.DataType.FP4}
_BLOCK = 16  # elements of the last axis that share a scale in NVFP4

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Converter = Callable[[ConversionContext, Any, Args, Kwargs, str], Any]


def _converter(target: Any, **options: Any) -> Callable[[Converter], Converter]:
    """Registers a converter for `target`, at dynamic shapes too."""
    register: Callable[[Converter], Converter] = dynamo_tensorrt_converter(
        target, supports_dynamic_shapes=True, **options
    )
    return register


@_converter(QUANTIZE)
def quantize(ctx: ConversionContext, target: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    fmt = get_format(kwargs["format"])
    if fmt.is_fp4:
        raise NotImplementedError("NVFP4 with scales that are constants: only dynamic_quantize has a layer")
    axis, scale = _scale(ctx, args[1], f"{name}_scale")
    layer = ctx.net.add_quantize(_tensor(ctx, args[0], f"{name}_input"), scale, _CODES[fmt.storage])
    if axis is not None:
        layer.axis = axis
    return layer.get_output(0)


@_converter(DEQUANTIZE)
def dequantize(ctx: ConversionContext, target: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    fmt = get_format(kwargs["format"])
    if fmt.powers or fmt.family == "int4":
        raise NotImplementedError(f"{fmt.name} has no layer on this route: export to ONNX, which has INT4")
    if len(fmt.sizes) > 1:
        raise NotImplementedError(f"weights in blocks, {fmt.name}, which the pipeline was to write as operators")
    codes = get_trt_tensor(ctx, args[0], f"{name}_codes", target_quantized_type=_CODES[fmt.storage])
    wanted = dtype_of(kwargs["dtype"]).to(trt.DataType)
    if fmt.sizes:
        # TensorRT refuses FP4 into another type than that of its scales, and sees through a cast
        scale = _tensor(ctx, args[1], f"{name}_scale")
        layer = ctx.net.add_dequantize(codes, scale, scale.dtype)
        layer.axis = -1
        result = layer.get_output(0)
        return result if scale.dtype == wanted else ctx.net.add_cast(result, wanted).get_output(0)
    axis, scale = _scale(ctx, args[1], f"{name}_scale")
    layer = ctx.net.add_dequantize(codes, scale, wanted)
    if axis is not None:
        layer.axis = axis
    return layer.get_output(0)


@_converter(DYNAMIC_QUANTIZE)
def dynamic_quantize(ctx: ConversionContext, target: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    if not get_format(kwargs["format"]).is_fp4:
        raise NotImplementedError(f"scales from run time, {kwargs['format']}, which the pipeline was to spell out")
    layer = ctx.net.add_dynamic_quantize(args[0], -1, _BLOCK, trt.DataType.FP4, trt.DataType.FP8)
    layer.set_input(1, _tensor(ctx, args[1], f"{name}_global_scale"))
    return layer.get_output(0), layer.get_output(1)


@_converter(ATTENTION)
def attention(ctx: ConversionContext, target: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    """A long causal attention without a mask, which reads grouped heads without a copy: others are decomposed."""
    q, k, v, mask, softmax_scale = args
    if mask is not None or not kwargs["is_causal"]:
        raise NotImplementedError("a quantized attention that is not plainly causal, which the pipeline decomposes")
    layer = _causal_attention(ctx, q, k, v)
    layer.normalization_quantize_scale = _tensor(ctx, softmax_scale, f"{name}_softmax_scale")
    layer.normalization_quantize_to_type = _CODES[get_format(kwargs["format"]).storage]
    return layer.get_output(0)


def _is_ours(node: Node, settings: Any = None) -> bool:
    return OURS in node.meta


@_converter(SDPA, capability_validator=_is_ours, priority=ConverterPriority.HIGH)
def half_attention(ctx: ConversionContext, target: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    """A long causal attention without a mask, as above in half precision: `lower` has decomposed others."""
    q, k, v = args[:3]
    scale = kwargs.get("scale")
    scale = float(q.shape[-1]) ** -0.5 if scale is None else scale
    factor = get_trt_tensor(ctx, torch.full((1,) * len(q.shape), scale), f"{name}_scale", dtype_of(q.dtype))
    scaled = ctx.net.add_elementwise(q, factor, trt.ElementWiseOperation.PROD).get_output(0)
    return _causal_attention(ctx, scaled, k, v).get_output(0)


def _causal_attention(ctx: ConversionContext, q: Any, k: Any, v: Any) -> Any:
    """The layer, whose scores are not scaled."""
    # torch means upper-left; Torch-TensorRT's own converter takes causal for lower-right
    softmax, causal = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.UPPER_LEFT
    layer = ctx.net.add_attention_v2(q, k, v, softmax, causal)
    layer.decomposable = True  # at shapes without a fused kernel
    return layer


def _has_constants(node: Node, settings: Any = None) -> bool:
    return OURS in node.meta and all(n is None or (isinstance(n, Node) and n.op == "get_attr") for n in node.args[2:4])


@_converter(aten.layer_norm.default, capability_validator=_has_constants, priority=ConverterPriority.HIGH)
def layer_norm(ctx: ConversionContext, target: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    """Torch-TensorRT's own converter expands weight and bias, which at dynamic shapes costs a kernel."""
    x, normalized, weight, bias, eps = (*args, *(None, None, 1e-5)[len(args) - 2 :])[:5]
    x = _tensor(ctx, x, f"{name}_input")
    rank = len(x.shape)
    shape = (*(1,) * (rank - len(normalized)), *normalized)
    kind = dtype_of(x.dtype).to(torch.dtype)
    weight = torch.ones(shape, dtype=kind) if weight is None else weight.reshape(shape)
    bias = torch.zeros(shape, dtype=kind) if bias is None else bias.reshape(shape)
    axes = sum(1 << axis for axis in range(rank - len(normalized), rank))
    operands = (_tensor(ctx, weight, f"{name}_weight"), _tensor(ctx, bias, f"{name}_bias"))
    layer = ctx.net.add_normalization_v2(x, *operands, axes)
    layer.epsilon = eps
    return layer.get_output(0)


_ARITHMETIC = {
    aten.add.Tensor: trt.ElementWiseOperation.SUM,
    aten.sub.Tensor: trt.ElementWiseOperation.SUB,
    aten.mul.Tensor: trt.ElementWiseOperation.PROD,
    aten.div.Tensor: trt.ElementWiseOperation.DIV,
}


def _is_float_arithmetic(node: Node, settings: Any = None) -> bool:
    operands = [operand.meta["val"] if isinstance(operand, Node) else operand for operand in node.args]
    kinds = {value.dtype for value in (*operands, val(node)) if isinstance(value, torch.Tensor)}
    floats = len(kinds) == 1 and kinds <= {torch.float16, torch.bfloat16, torch.float32}
    known = all(isinstance(operand, (torch.Tensor, int, float)) for operand in operands)  # and no dynamic size
    return OURS in node.meta and not node.kwargs and known and floats  # a keyword is alpha


def arithmetic(ctx: ConversionContext, target: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    """TensorRT repeats axes of one element itself; what Torch-TensorRT's own converters repeat before the layer splits
    kernels, as those of a norm behind a causal attention."""
    rank = max(len(operand.shape) for operand in args if not isinstance(operand, (int, float)))
    kind = next(operand.dtype for operand in args if not isinstance(operand, (int, float)))
    operands = []
    for operand, place in zip(args, ("first", "second"), strict=True):
        if isinstance(operand, (int, float)):
            operand = torch.full((1,) * rank, operand, dtype=dtype_of(kind).to(torch.dtype))
        missing = rank - len(operand.shape)
        if isinstance(operand, torch.Tensor):
            operand = _tensor(ctx, operand.reshape((1,) * missing + operand.shape), f"{name}_{place}")
        elif missing:
            operand = prepend_ones(ctx, operand, f"{name}_{place}", missing)
        operands.append(operand)
    return ctx.net.add_elementwise(*operands, _ARITHMETIC[target]).get_output(0)


for _target in _ARITHMETIC:
    _converter(_target, capability_validator=_is_float_arithmetic, priority=ConverterPriority.HIGH)(arithmetic)


def _compares_integers(node: Node, settings: Any = None) -> bool:
    kinds = (torch.int32, torch.int64)
    return OURS in node.meta and all(isinstance(n, Node) and val(n).dtype in kinds for n in node.args)


@_converter(aten.le.Tensor, capability_validator=_compares_integers, priority=ConverterPriority.HIGH)
def less_or_equal(ctx: ConversionContext, target: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    """Not greater, in which TensorRT sees a causal mask; Torch-TensorRT's own converter writes less, or equal."""
    greater = impl.elementwise.gt(ctx, target, None, f"{name}_greater", *args)
    return impl.unary.logical_not(ctx, target, None, name, greater)


@_converter(aten.clone.default, capability_validator=_is_ours, priority=ConverterPriority.HIGH)
def clone(ctx: ConversionContext, target: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    """Torch-TensorRT's own converter is not for dynamic shapes."""
    return ctx.net.add_identity(_tensor(ctx, args[0], f"{name}_source")).get_output(0)


@_converter(aten.gather.default, capability_validator=_is_ours, priority=ConverterPriority.HIGH)
def gather(ctx: ConversionContext, target: Any, args: Args, kwargs: Kwargs, name: str) -> Any:
    """As `clone`."""
    source, index = _tensor(ctx, args[0], f"{name}_source"), _tensor(ctx, args[2], f"{name}_index")
    layer = ctx.net.add_gather_v2(source, index, trt.GatherMode.ELEMENT)
    layer.axis = args[1] % len(source.shape)
    return layer.get_output(0)


def _tensor(ctx: ConversionContext, value: Any, name: str) -> Any:
    return get_trt_tensor(ctx, value, name)


def _scale(ctx: ConversionContext, scale: Any, name: str) -> tuple[int | None, Any]:
    """(axis, scale as TensorRT has it): a scalar as it is, `[N, 1]` as `[N]` on axis 0, `[1, N]` as `[N]` on axis 1."""
    shape = tuple(scale.shape)
    if not shape:
        return None, _tensor(ctx, scale, name)
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    if len(wide) > 1 or not isinstance(scale, torch.Tensor):
        raise NotImplementedError(f"a scale of shape {shape}, neither of the tensor nor of one axis")
    return (wide[0] if wide else 0), _tensor(ctx, scale.reshape(-1), name)
