"""The quantized IR: three operators that carry every format, and attention whose probabilities are quantized.

Granularity is read off the scale's shape, which broadcasts: a scalar is per tensor, `[N, 1]` per channel of a `[N, K]`
weight, `[..., 1]` per token. Each operator has a fake and a reference in plain torch, so a program that holds
them captures, exports, saves and runs anywhere. Back ends lower them; nothing evaluates them early.
"""

from __future__ import annotations

import torch

from passes.formats import get_format

_LIBRARY = torch.library.Library("qcompile", "DEF")
_LIBRARY.define("quantize(Tensor x, Tensor scale, *, str format) -> Tensor")
_LIBRARY.define("dequantize(Tensor q, Tensor scale, *, str format, ScalarType dtype) -> Tensor")
_LIBRARY.define("dynamic_quantize(Tensor x, Tensor? global_scale, *, str format) -> (Tensor q, Tensor scale)")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor softmax_scale, *, bool is_causal, str format)"
    " -> Tensor"
)

_EPSILON = 1e-6  # amax of an all-zero block: any positive number gives zeros


def quantize(x: torch.Tensor, scale: torch.Tensor, *, format: str) -> torch.Tensor:
    """`x / scale` in fp32, rounded to the codes of `format` with saturation."""
    return get_format(format).encode(x.float() / scale.float())


def dequantize(q: torch.Tensor, scale: torch.Tensor, *, format: str, dtype: torch.dtype) -> torch.Tensor:
    """`q * scale` in fp32, rounded to `dtype`."""
    return (q.float() * scale.float()).to(dtype)


def dynamic_quantize(
    x: torch.Tensor, global_scale: torch.Tensor | None, *, format: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `x` with scales measured on it: `amax / max` over each block of `format`, in the dtype of `x`."""
    fmt = get_format(format)
    if global_scale is not None or fmt.block not in ((), (None,)):
        raise NotImplementedError(f"dynamic_quantize to {format!r} with a global scale or blocks smaller than an axis")
    amax = x.abs().amax(dim=-1, keepdim=True) if fmt.block else x.abs().amax()
    # float16 would round the scale of a token below 1e-5 to 0, and its codes would be NaN
    scale = (amax.float().clamp_min(_EPSILON) / fmt.max).to(x.dtype).clamp_min(torch.finfo(x.dtype).smallest_normal)
    return quantize(x, scale, format=format), scale


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


for _reference in (quantize, dequantize, dynamic_quantize, attention):
    _LIBRARY.impl(_reference.__name__, _reference, "CompositeExplicitAutograd")


@torch.library.register_fake("qcompile::quantize", lib=_LIBRARY)
def _quantize_fake(x: torch.Tensor, scale: torch.Tensor, *, format: str) -> torch.Tensor:
    return torch.empty_like(x, dtype=get_format(format).storage)


@torch.library.register_fake("qcompile::dequantize", lib=_LIBRARY)
def _dequantize_fake(q: torch.Tensor, scale: torch.Tensor, *, format: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(q, dtype=dtype)


@torch.library.register_fake("qcompile::dynamic_quantize", lib=_LIBRARY)
def _dynamic_quantize_fake(
    x: torch.Tensor, global_scale: torch.Tensor | None, *, format: str
) -> tuple[torch.Tensor, torch.Tensor]:
    fmt = get_format(format)
    scale = x.new_empty((*x.shape[:-1], 1) if fmt.block else ())
    return torch.empty_like(x, dtype=fmt.storage), scale


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


QUANTIZE = torch.ops.qcompile.quantize.default
DEQUANTIZE = torch.ops.qcompile.dequantize.default
DYNAMIC_QUANTIZE = torch.ops.qcompile.dynamic_quantize.default
ATTENTION = torch.ops.qcompile.attention.default
