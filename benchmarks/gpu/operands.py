"""Operands of matrix products in every format: codes and scales, and how `scaled_mm` wants them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.functional import ScalingType, SwizzleType

from passes.formats import FP8, FP8_1X128, FP8_128X128, FP8_PER_TOKEN, NVFP4, Format
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE, block_amax


@dataclass(frozen=True)
class Operand:
    """`[rows, K]` as codes and scales, which multiply."""

    codes: torch.Tensor
    scale: torch.Tensor
    format: Format
    global_scale: torch.Tensor | None = None

    def laid_out_scale(self) -> torch.Tensor:
        """The scale in fp32, with M as the inner axis where there are several to a row; NVFP4's as it is."""
        if self.global_scale is not None:
            return self.scale
        return self.scale.float().t().contiguous().t() if self.format is FP8_1X128 else self.scale.float()

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return dequantize(self.codes, self.scale, self.global_scale, self.format, dtype)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor | None, format: Format, dtype: torch.dtype
) -> torch.Tensor:
    """In the operators that qcompile's programs are made of."""
    if global_scale is not None:
        scale = DEQUANTIZE(scale, global_scale, format=FP8.name, dtype=torch.float32)
    return DEQUANTIZE(codes, scale, format=format.name, dtype=dtype)


def _one_scale(x: torch.Tensor) -> Operand:
    scale = x.abs().amax().float() / FP8.max
    return Operand(QUANTIZE(x, scale, format=FP8.name), scale, FP8)


def _dynamic(x: torch.Tensor, format: Format) -> Operand:
    codes, scale = DYNAMIC_QUANTIZE(x, None, format=format.name)
    return Operand(codes, scale, format)


def _squares(weight: torch.Tensor) -> Operand:
    scale = block_amax(weight, FP8_128X128) / FP8_128X128.max
    return Operand(QUANTIZE(weight, scale, format=FP8_128X128.name), scale, FP8_128X128)


def _rows(weight: torch.Tensor) -> Operand:
    scale = weight.abs().amax(1, keepdim=True).float() / FP8.max
    return Operand(QUANTIZE(weight, scale, format=FP8.name), scale, FP8)


def _nvfp4(x: torch.Tensor) -> Operand:
    global_scale = x.abs().amax().float() / NVFP4.global_max
    codes, scale = DYNAMIC_QUANTIZE(x, global_scale, format=NVFP4.name)
    return Operand(codes, scale, NVFP4, global_scale)


@dataclass(frozen=True)
class Scheme:
    """A pair of formats.

    Attributes:
        name: the end of the variants' names.
        kind: whose peak counts.
        recipe: of qcompile; `static` if it wants calibration.
        input, weight: from a half-precision tensor to an operand, with the numbers that the recipe gives.
        capability: least compute capability with a kernel in torch.
    """

    name: str
    kind: str
    recipe: str
    input: Callable[[torch.Tensor], Operand]
    weight: Callable[[torch.Tensor], Operand]
    static: bool = False
    capability: tuple[int, int] = (8, 9)


ROWS = Scheme("row", "fp8", "fp8_per_channel_per_token", lambda x: _dynamic(x, FP8_PER_TOKEN), _rows)
SCHEMES = (
    Scheme("tensor", "fp8", "fp8_gemm", _one_scale, _one_scale, static=True),
    ROWS,
    Scheme("block", "fp8", "fp8_block", lambda x: _dynamic(x, FP8_1X128), _squares),
    Scheme("nvfp4", "nvfp4", "nvfp4_fast", _nvfp4, _nvfp4, static=True, capability=(10, 0)),
)


def scaled_mm(scheme: Scheme, a: Operand, b: Operand, *, fast: bool = False) -> Callable[[], torch.Tensor]:
    """`a @ b.T` in bf16 through torch's public function, operands laid out beforehand.

    Layouts of the scales: https://docs.nvidia.com/cuda/cublas (block scaling for FP8, 128 x 4 tiles for NVFP4).
    """
    columns, scale_a, scale_b = b.codes.t(), a.laid_out_scale(), b.scale.float()
    if scheme.name == "tensor":
        recipe_a = recipe_b = ScalingType.TensorWise
    elif scheme.name == "row":
        recipe_a = recipe_b = ScalingType.RowWise
        scale_b = scale_b.t()
    elif scheme.name == "block":
        recipe_a, recipe_b = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        scale_b = F.pad(scale_b, (0, -scale_b.shape[1] % 4)).t()  # K is the inner axis, padded to a multiple of 4
    else:
        return _scaled_mm_nvfp4(a, b)
    return lambda: F.scaled_mm(a.codes, columns, scale_a, recipe_a, scale_b, recipe_b, use_fast_accum=fast)


def _scaled_mm_nvfp4(a: Operand, b: Operand) -> Callable[[], torch.Tensor]:
    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    packed_a, packed_b = (x.codes.view(torch.float4_e2m1fn_x2) for x in (a, b))
    assert a.global_scale is not None and b.global_scale is not None
    scales_a, scales_b = [_tiled(a.scale), a.global_scale], [_tiled(b.scale), b.global_scale]
    return lambda: F.scaled_mm(
        packed_a, packed_b.t(), scales_a, recipe, scales_b, recipe, swizzle_a=swizzle, swizzle_b=swizzle
    )


def _tiled(scales: torch.Tensor) -> torch.Tensor:
    """`[rows, K / 16]` e4m3 in tiles of 128 x 4, a tile as 32 times 4 x 4."""
    rows, columns = scales.shape
    bytes = F.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = bytes.unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, 4)).permute(0, 3, 2, 1, 4)
    return tiles.flatten().view(torch.float8_e4m3fn)
