"""The quantized IR: three operators that carry every format, and the two neutral nodes that ATen has no operator for:
attention whose probabilities are quantized, and the linear layers of all experts of a mixture at once.

Granularity is read off the scale's shape, which broadcasts: a scalar is per tensor, `[N, 1]` per channel of a `[N, K]`
weight, `[..., 1]` per token; a format that has blocks wants a scale for each, `[..., K / 16]` or `[N / 128, K / 128]`,
rounded up. A format of two levels is a chain, exactly as in ONNX: `s = dequantize(block_scales, global_scale)`,
`x = dequantize(codes, s)`.
Each operator has a fake and a reference in plain torch, so a program that holds them captures, exports, saves and runs
anywhere. Back ends lower them; nothing evaluates them early. They are for inference: where autograd would want a
gradient of one, it refuses.
"""

from __future__ import annotations

import torch

from passes.formats import Format, get_format
from passes.gradients import refuse_gradients
from passes.result import Carried as Carried  # which saved programs name, too

_LIBRARY = torch.library.Library("qcompile", "DEF")
_LIBRARY.define("quantize(Tensor x, Tensor scale, *, str format) -> Tensor")
_LIBRARY.define("dequantize(Tensor q, Tensor scale, *, str format, ScalarType dtype) -> Tensor")
_LIBRARY.define("dynamic_quantize(Tensor x, Tensor? global_scale, *, str format) -> (Tensor q, Tensor scale)")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor softmax_scale, *, bool is_causal, str format)"
    " -> Tensor"
)
_LIBRARY.define("batched_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")

LEAST_BLOCK_SCALE = 2.0**-9  # the smallest e4m3


def quantize(x: torch.Tensor, scale: torch.Tensor, *, format: str) -> torch.Tensor:
    """`x / scale` in fp32, rounded to the codes of `format` with saturation."""
    fmt = get_format(format)
    return fmt.encode(x.float() / fmt.per_element(scale.float(), x.shape))


def dequantize(q: torch.Tensor, scale: torch.Tensor, *, format: str, dtype: torch.dtype) -> torch.Tensor:
    """`q * scale` in fp32, rounded to `dtype`."""
    fmt = get_format(format)
    values = fmt.decode(q)
    return (values * fmt.per_element(scale.float(), values.shape)).to(dtype)


def dynamic_quantize(
    x: torch.Tensor, global_scale: torch.Tensor | None, *, format: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `x` with scales measured on it: `amax / max` over each block of `format`.

    Args:
        x: `[..., K]`.
        global_scale: fp32 scalar for a format of two levels, None for the others.

    Returns:
        Codes, and their scale in float32: one for each block, each token or the tensor; of a format of two levels the
        codes of those scales, to be dequantized with `global_scale`.
    """
    fmt = get_format(format)
    if (global_scale is None) != (fmt.scale is None):
        raise ValueError(f"{format} {'needs a' if global_scale is None else 'has no'} global scale")
    if fmt.scale is not None:
        assert global_scale is not None
        block_scales = fmt.scale.encode(block_scale_values(x, global_scale, fmt))
        scale = dequantize(block_scales, global_scale, format=fmt.scale.name, dtype=torch.float32)
        return quantize(x, scale, format=format), block_scales
    if fmt.sizes:
        scale = block_numbers(x, fmt)
        return quantize(x, scale, format=format), scale
    amax = x.abs().amax(dim=-1, keepdim=True) if fmt.block else _largest(x)
    # not in float16: 448 times the rounded scale of 65504 would be an infinity, and tiny scales have few digits
    scale = amax.float().clamp_min(least_amax(x.dtype)) / fmt.max
    return quantize(x, scale, format=format), scale


def least_amax(dtype: torch.dtype) -> float:
    """What takes the place of a smaller amax where one is measured for each token or the tensor: zeros stay zeros.

    Its reciprocal is finite in `dtype`, and the scale a normal float32.
    """
    return 2.0**-14 if dtype == torch.float16 else 2.0**-100


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in `x` `[..., K]`, 0 where another axis than the last is empty."""
    rows = x.abs().amax(dim=-1).reshape(-1)
    return torch.cat([rows, rows.new_zeros(1)]).amax()


def block_amax(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Largest magnitude in each block of `x`, in float32; the last block of an axis can be smaller than the others."""
    amax = x.abs()
    for axis, size in enumerate(fmt.sizes, -len(fmt.sizes)):
        missing = -amax.shape[axis] % size
        whole = torch.nn.functional.pad(amax, (0, 0) * (-1 - axis) + (0, missing)) if missing else amax
        amax = whole.unflatten(axis, (-1, size)).amax(axis)
    return amax.float()


def block_numbers(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The scale of each block of `x`, of a format of one level, in float32.

    A block of zeros, or as good as, has the scale 1: any positive number gives zeros.
    """
    scale = block_amax(x, fmt) / fmt.max
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)
    return powers_above(scale) if fmt.powers else scale


def powers_above(scale: torch.Tensor) -> torch.Tensor:
    """The least power of two that each of positive numbers is not above: nothing saturates, as in Model Optimizer."""
    return ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def block_scale_values(x: torch.Tensor, global_scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """`[..., K]` -> `[..., K / block]`: the scale of each block in units of `global_scale`, not yet rounded.

    Model Optimizer's arithmetic (its CPU export is the reference): fp32, a block of zeros has the scale 1, and a scale
    that e4m3 would round to 0 is its smallest number.
    """
    scale = block_amax(x, fmt) / (fmt.max * global_scale)
    return torch.where(scale == 0, 1.0, scale.clamp_min(LEAST_BLOCK_SCALE))


def repeat_kv(kv: torch.Tensor, heads: int) -> torch.Tensor:
    """`[B, Hkv, S, D]` -> `[B, heads, S, D]`, every key/value head serving `heads / Hkv` query heads."""
    batch, kv_heads, length, width = kv.shape
    if kv_heads == heads:
        return kv
    return kv[:, :, None].expand(batch, kv_heads, heads // kv_heads, length, width).reshape(batch, heads, length, width)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    softmax_scale: torch.Tensor,
    *,
    is_causal: bool,
    format: str,
) -> torch.Tensor:
    """`QDQ(softmax(q k^T + mask)) v`: the one place where a quantizer sits inside an attention.

    Args:
        q: `[B, H, Sq, D]`, already multiplied by the attention scale.
        k, v: `[B, Hkv, Sk, D]`; H is a multiple of Hkv (grouped-query attention).
        mask: added to the scores, broadcastable to `[B, H, Sq, Sk]`, dtype of `q`.
        softmax_scale: scalar; 1/448 for FP8 needs no calibration, as probabilities are at most 1.
        is_causal: hide key j from query i where j > i (upper-left aligned, as in torch).
    """
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    scores = q @ k.transpose(-1, -2)
    if is_causal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None:
        scores = scores + mask
    probabilities = scores.softmax(-1)
    codes = quantize(probabilities, softmax_scale, format=format)
    return dequantize(codes, softmax_scale, format=format, dtype=q.dtype) @ v


def batched_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`aten.linear` for each of E weights: the experts of a mixture.

    Args:
        x: `[E, M, K]`, or `[1, M, K]` where every expert reads the same rows.
        weight: `[E, N, K]`.
        bias: `[E, N]`.

    Returns:
        `[E, M, N]`.
    """
    result = x @ weight.transpose(-1, -2)
    return result if bias is None else result + bias.unsqueeze(-2)


for _reference in (quantize, dequantize, dynamic_quantize, attention, batched_linear):
    _LIBRARY.impl(_reference.__name__, _reference, "CompositeExplicitAutograd")
    refuse_gradients(_LIBRARY, _reference.__name__)


@torch.library.register_fake("qcompile::quantize", lib=_LIBRARY)
def _quantize_fake(x: torch.Tensor, scale: torch.Tensor, *, format: str) -> torch.Tensor:
    return _codes_like(x, get_format(format))


@torch.library.register_fake("qcompile::dequantize", lib=_LIBRARY)
def _dequantize_fake(q: torch.Tensor, scale: torch.Tensor, *, format: str, dtype: torch.dtype) -> torch.Tensor:
    if get_format(format).packed:
        return q.new_empty((*q.shape[:-1], q.shape[-1] * 2), dtype=dtype)
    return torch.empty_like(q, dtype=dtype)


@torch.library.register_fake("qcompile::dynamic_quantize", lib=_LIBRARY)
def _dynamic_quantize_fake(
    x: torch.Tensor, global_scale: torch.Tensor | None, *, format: str
) -> tuple[torch.Tensor, torch.Tensor]:
    fmt = get_format(format)
    sizes = (*x.shape[:-1], 1) if fmt.block else ()
    if fmt.sizes:
        sizes = (*x.shape[: -len(fmt.sizes)], *fmt.blocks(x.shape))
    scale = x.new_empty(sizes, dtype=fmt.scale.storage if fmt.scale else torch.float32)
    return _codes_like(x, fmt), scale


def _codes_like(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The shape and dtype of the codes of `x`."""
    if fmt.packed:
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=fmt.storage)
    return torch.empty_like(x, dtype=fmt.storage)


@torch.library.register_fake("qcompile::attention", lib=_LIBRARY)
def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    softmax_scale: torch.Tensor,
    *,
    is_causal: bool,
    format: str,
) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.register_fake("qcompile::batched_linear", lib=_LIBRARY)
def _batched_linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((weight.shape[0], x.shape[1], weight.shape[1]))


QUANTIZE = torch.ops.qcompile.quantize.default
DEQUANTIZE = torch.ops.qcompile.dequantize.default
DYNAMIC_QUANTIZE = torch.ops.qcompile.dynamic_quantize.default
ATTENTION = torch.ops.qcompile.attention.default
BATCHED_LINEAR = torch.ops.qcompile.batched_linear.default
