"""NVFP4 in numpy and ml_dtypes: what the tests of every stage hold codes, scales and products against."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

Array = np.ndarray[Any, Any]
VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
BLOCK = 16


def e2m1(x: Array) -> Array:
    """4-bit codes of fp32 values as ml_dtypes rounds them, but that -0.0 is 0, as Model Optimizer has it."""
    codes = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return np.where((codes == 8) & (x == 0), 0, codes).astype(np.uint8)


def oracle(x: Any, global_scale: Any) -> tuple[Array, Array]:
    """`[..., K]` -> codes `[..., K]`, one a byte, and e4m3 block scales `[..., K / 16]`, in Model Optimizer's order."""
    x, g = np.asarray(x).astype(np.float32), np.float32(global_scale)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    raw = np.abs(blocks).max(-1) / (np.float32(6) * g)
    guarded = np.where(raw == 0, np.float32(1), np.clip(raw, np.float32(2**-9), np.float32(448)))
    scales = guarded.astype(ml_dtypes.float8_e4m3fn)
    scaled = blocks / (scales.astype(np.float32) * g)[..., None]
    return e2m1(scaled).reshape(x.shape), scales


def values(codes: Array, scales: Array, global_scale: Any) -> Array:
    """The fp32 numbers that codes (one a byte) and block scales stand for."""
    factors = scales.astype(np.float32) * np.float32(global_scale)
    return VALUES[codes] * np.repeat(factors, BLOCK, axis=-1)


def rounded(x: Any, global_scale: Any) -> Array:
    """`x` after a round trip through NVFP4."""
    return values(*oracle(x, global_scale), global_scale)


def unpacked(codes: torch.Tensor | Array) -> Array:
    """Bytes `[..., K / 2]` -> codes `[..., K]`: the even index in the low nibble."""
    packed = np.asarray(codes)
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def bits(scales: torch.Tensor | Array) -> Array:
    """The bits of e4m3 scales."""
    return scales.view(torch.uint8).numpy() if isinstance(scales, torch.Tensor) else scales.view(np.uint8)


def global_scale(x: Any) -> torch.Tensor:
    """amax / (6 * 448), as calibration has it."""
    return torch.as_tensor(x).float().abs().amax() / 2688
