"""One quantized linear layer outside of a graph: its codes and scales, as checkpoints and other tools hold them.

All scales multiply: `weight = codes * scale`, under `global_scale` where the format has two levels. Checkpoint formats
that divide convert on their way in and out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from passes.formats import Format
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.place.low_rank import DOWN, UP
from qcompile.schemes.scheme import Scheme

__all__ = ["QuantizedLinear", "QuantizedWeight", "Scheme"]


@dataclass
class QuantizedWeight:
    """Codes and scales of one layer.

    Attributes:
        scheme: what they are.
        codes: `[N, K]` float8_e4m3fn or int8; for NVFP4 uint8 `[N, K / 2]`. The fused experts of a mixture have a first
            axis E, here and in `scale`.
        scale: fp32 scalar; `[N, 1]` per channel; `[ceil(N / 128), ceil(K / 128)]` of FP8_128X128; for NVFP4
            float8_e4m3fn `[N, K / 16]`. Experts with one scale each have `[E, 1, 1]`.
        global_scale: fp32 scalar (`[E, 1, 1]`), NVFP4 only.
        input_scale: fp32 scalar where the input has a constant scale; the global one for NVFP4.
        low_rank: `(down [R, K], up [N, R])` in floating point, whose product is added to the weight.
    """

    scheme: Scheme
    codes: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None


def measured_global_scale(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """`amax / fmt.global_max` of a tensor in fp32: the scale of the scales of its blocks. Zeros have that of 1."""
    amax = x.abs().amax(tuple(range(x.ndim))).float()  # ONNX wants the axes
    return torch.where(amax > 0, amax, 1.0) / fmt.global_max


class QuantizedLinear(torch.nn.Module):
    """A linear layer, or the fused ones of all experts, that runs on codes through the operators of the IR.

    `torch.export` captures it as what `qcompile.quantize` makes of a float layer, and its tensors have the same names.

    Args:
        dtype: that of the float layer; None is float32.
    """

    bias: torch.Tensor | None
    svdquant_lora_a: torch.Tensor
    svdquant_lora_b: torch.Tensor

    def __init__(
        self, weight: QuantizedWeight, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.scheme = weight.scheme
        self.dtype = dtype or torch.float32
        two_levels = weight.scheme.weight.scale is not None
        self._register("weight", weight.codes)
        self._register("weight_block_scale" if two_levels else "weight_scale", weight.scale)
        if two_levels:
            self._register("weight_global_scale", weight.global_scale)
        if weight.scheme.has_input_scale:
            assert weight.scheme.input is not None
            kind = "input_global_scale" if weight.scheme.input.scale is not None else "input_scale"
            self._register(kind, weight.input_scale)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
        for name, factor in zip((DOWN, UP), weight.low_rank or (), strict=False):
            self.register_parameter(name, torch.nn.Parameter(factor, requires_grad=False))

    @property
    def codes(self) -> torch.Tensor:
        """The parameter called `weight`."""
        codes = self._parameters.get("weight")
        if codes is None:
            raise AttributeError("weight")  # while it is made
        return codes

    @property
    def weight(self) -> torch.Tensor:
        """What the codes stand for, in `dtype`, with the low-rank part.

        Models look at weights of children: T5 casts what it computes to the dtype of one, torch.nn.MultiheadAttention
        multiplies with one. Codes would be taken for values.
        """
        rest = self._dequantized(self.dtype)
        return rest + self.svdquant_lora_b @ self.svdquant_lora_a if self.scheme.low_rank else rest

    def _register(self, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None:
            raise ValueError(f"{name} is missing")
        # scales are buffers, and codes are not: what `quantize` makes has them so
        if name in ("weight", "weight_block_scale") or tensor.ndim > 1:
            self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        """`to`, `half` and their like move codes and scales, and convert the bias and the low-rank part alone."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            is_float = tensor is self.bias or any(tensor is self._parameters.get(name) for name in (DOWN, UP))
            return moved if is_float or moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` -> `[..., N]`; of experts `[E or 1, M, K]` -> `[E, M, N]`."""
        weight = self._dequantized(x.dtype)
        if self.scheme.low_rank:
            return self._with_low_rank(x, weight)
        x = self._quantized(x)
        if weight.ndim == 3:
            result: torch.Tensor = torch.ops.qcompile.batched_linear(x, weight, self.bias)
            return result
        return torch.nn.functional.linear(x, weight, self.bias)

    def _with_low_rank(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `passes.place.low_rank` writes it."""
        down, up = self.svdquant_lora_a.to(x.dtype), self.svdquant_lora_b.to(x.dtype)
        rest = torch.nn.functional.linear(self._quantized(x), weight)
        return rest + torch.nn.functional.linear(torch.nn.functional.linear(x, down), up, self.bias)

    def _dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        fmt = self.scheme.weight
        scale = self.weight_scale if fmt.scale is None else self.weight_block_scale
        if fmt.scale is not None:
            scale = DEQUANTIZE(scale, self.weight_global_scale, format=fmt.scale.name, dtype=torch.float32)
        result: torch.Tensor = DEQUANTIZE(self.codes, scale, format=fmt.name, dtype=dtype)
        return result

    def _quantized(self, x: torch.Tensor) -> torch.Tensor:
        fmt = self.scheme.input
        if fmt is None:
            return x
        if self.scheme.has_input_scale and fmt.scale is None:
            codes, scale = QUANTIZE(x, self.input_scale, format=fmt.name), self.input_scale
        else:
            global_scale = None
            if fmt.scale is not None:
                global_scale = measured_global_scale(x, fmt) if self.scheme.measured else self.input_global_scale
            codes, scale = DYNAMIC_QUANTIZE(x, global_scale, format=fmt.name)
            if fmt.scale is not None:
                scale = DEQUANTIZE(scale, global_scale, format=fmt.scale.name, dtype=torch.float32)
        result: torch.Tensor = DEQUANTIZE(codes, scale, format=fmt.name, dtype=x.dtype)
        return result

    def extra_repr(self) -> str:
        fmt = self.scheme.input
        return f"{tuple(self.codes.shape)}, weight={self.scheme.weight.name}, input={fmt.name if fmt else None}"
