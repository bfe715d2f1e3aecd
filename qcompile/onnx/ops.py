"""How the IR operators are written in ONNX: translation functions for the `torch.onnx` exporter.

Everything is a standard operator but `trt::TRT_QuantizedAttention` and `trt::TRT_FP4DynamicQuantize`, which TensorRT
has built in; their bodies of standard operators are in `qcompile.onnx.functions`, so that any other tool can run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir
import onnxscript
import torch
from onnxscript.function_libs.torch_lib.ops.core import aten_roll
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention

from passes.formats import FP8, INT4_COLUMNS, get_format
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.sdpa import SDPA
from qcompile.onnx.fp4 import BLOCK, FLOAT4E2M1, FLOAT8E4M3FN, FP4_DYNAMIC_QUANTIZE
from qcompile.onnx.functions import QUANTIZED_ATTENTION

_ZERO_POINT_DTYPES: Mapping[torch.dtype, Any] = {
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.int8: np.int8,
}


FLOAT = int(onnx_ir.DataType.FLOAT)


def translation_table(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """FX operator -> function that writes it with the operators of `opset`, for `torch.onnx.export`."""
    op = getattr(onnxscript, f"opset{opset}")

    def quantize(x: Any, scale: Any, format: str) -> Any:
        if get_format(format).is_fp4:
            return op.QuantizeLinear(x, scale, axis=-1, block_size=BLOCK, output_dtype=FLOAT4E2M1)
        axis, flat = _granularity(op, scale)
        return op.QuantizeLinear(x, flat, _zero_point(op, scale, format), axis=axis)

    def dequantize(q: Any, scale: Any, format: str, dtype: int) -> Any:
        fmt = get_format(format)
        if fmt.sizes:
            # float32 scales make a float32 result: TensorRT refuses `output_dtype` on FP4, and sees through the Cast
            if fmt in INT4_COLUMNS.values():  # ONNX Runtime looks for the axis 0, and for no other name of it
                return op.DequantizeLinear(q, scale, axis=q.shape.rank() - 2, block_size=fmt.sizes[0])
            wide = op.DequantizeLinear(q, scale, axis=-1, block_size=fmt.sizes[-1])
            return wide if dtype == FLOAT else op.Cast(wide, to=dtype)
        axis, flat = _granularity(op, scale)
        return op.DequantizeLinear(q, flat, _zero_point(op, scale, format), axis=axis)

    def rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
        return _rms_norm(op, x, len(normalized_shape), weight, eps)

    def dynamic_quantize(x: Any, global_scale: Any, format: str) -> Any:
        if not get_format(format).is_fp4:
            raise NotImplementedError(
                f"ONNX has no operator for scales of {format} that are measured at run time, and no pass writes them:"
                " quantize the weights alone, or activations in another format"
            )
        return FP4_DYNAMIC_QUANTIZE(x, global_scale, axis=-1, block_size=BLOCK, scale_type=FLOAT8E4M3FN)

    return {
        QUANTIZE: quantize,
        DYNAMIC_QUANTIZE: dynamic_quantize,
        DEQUANTIZE: dequantize,
        ATTENTION: attention,
        # matmul, softmax, matmul at every opset: ONNX Runtime refuses opset 23's Attention with a mask that broadcasts
        SDPA: aten_scaled_dot_product_attention,
        torch.ops.aten.rms_norm.default: rms_norm,
        torch.ops.aten.roll.default: roll,
    }


def _granularity(op: Any, scale: Any) -> tuple[int, Any]:
    """(axis, scale as ONNX wants it): a scalar as it is, `[N, 1]` as `[N]` on axis 0, `[1, N]` as `[N]` on axis 1."""
    shape = [int(size) for size in scale.shape]
    if not shape:
        return 1, scale
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    if len(wide) > 1:
        raise NotImplementedError(f"a scale of shape {shape} is per block, which this lowering does not write")
    return wide[0] if wide else 0, op.Reshape(scale, op.Constant(value_ints=[-1]))


def _zero_point(op: Any, scale: Any, format: str) -> Any:
    """Zeros of the code's type, shaped as the scale: they tell QuantizeLinear its output type at any opset."""
    dtype = _ZERO_POINT_DTYPES[get_format(format).storage]
    count = int(np.prod([int(size) for size in scale.shape]))
    return op.Constant(value=onnx_ir.tensor(np.zeros((count,) if scale.shape.rank() else (), dtype=dtype)))


def attention(q: Any, k: Any, v: Any, mask: Any, softmax_scale: Any, is_causal: bool, format: str) -> Any:
    """An attention as TensorRT's own operator; the pipeline has decomposed those that are better products."""
    if format != FP8.name:
        raise NotImplementedError(f"TensorRT's operator has FP8 attention, and this one is in {format}")
    heads, kv_heads = int(q.shape[1]), int(k.shape[1])
    return QUANTIZED_ATTENTION(
        q,
        k,
        v,
        mask,
        softmax_scale,
        normalization_quantize_to_type=FLOAT8E4M3FN,
        scale=1.0,
        is_causal=int(is_causal),
        TRT_decomposable=1,
        kv_repeats=[1, 1, heads // kv_heads, 1, 1],
        kv_shape=[0, heads, -1, int(k.shape[3])],
    )


def roll(x: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    """With axes counted from the front: onnxscript before 0.7.2 takes the size of axis -1 for nothing."""
    return aten_roll(x, shifts, [axis % x.shape.rank() for axis in dims])


def _rms_norm(op: Any, x: Any, rank: int, weight: Any, eps: float | None) -> Any:
    """RMSNormalization where the opset has it, else its definition, computed in float32.

    So is the product with the weight, as in torch: rounded before it, TensorRT multiplies the weight and the scale of a
    Q behind it into one, and, where the norm reads a transposed tensor, quantizes in a kernel of its own.
    """
    if eps is None:
        eps = float(np.finfo(np.float32).eps)
    if op.version >= 23 and weight is not None:
        return op.RMSNormalization(x, weight, axis=-rank, epsilon=eps, stash_type=1)
    wide = op.Cast(x, to=1)
    mean = op.ReduceMean(op.Mul(wide, wide), op.Constant(value_ints=list(range(-rank, 0))), keepdims=1)
    root = op.Sqrt(op.Add(mean, op.Constant(value=onnx_ir.tensor(np.float32(eps)))))
    normal = op.Div(wide, root)
    return op.CastLike(normal if weight is None else op.Mul(normal, op.Cast(weight, to=1)), x)
