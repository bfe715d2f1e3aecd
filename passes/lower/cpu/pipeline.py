"""The lowering for a CPU: forms that Inductor compiles and that compute what the operators of the IR do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.fx import Node

from passes.base import Pass
from passes.graph import dtype
from passes.legalize.attention import DecomposeAttention
from passes.lower.cpu.convolutions import ConvolutionsToOneDnn
from passes.lower.cpu.fp4_activations import RoundFp4Activations
from passes.lower.cpu.half import WidenHalfProducts, multiplies_float16
from passes.lower.cpu.onednn_linears import OneDnnLinears
from passes.lower.device import Device
from passes.lower.fp4_codes import SpellOutFp4Codes
from passes.lower.fp4_weights import DecodeFp4Weights
from passes.lower.int_mm import LinearsToIntMm


def cpu_pipeline(device: Device) -> tuple[Callable[[], Pass], ...]:
    """The passes in their order; what they leave of the IR is decomposed to its reference in plain ATen."""
    assert device.type == "cpu"
    return (
        partial(LinearsToIntMm, device),
        OneDnnLinears,
        ConvolutionsToOneDnn,
        partial(DecomposeAttention, unless=_stays),
        WidenHalfProducts,
        RoundFp4Activations,
        DecodeFp4Weights,
        SpellOutFp4Codes,
    )


def _stays(attention: Node) -> bool:
    """Whether the products of a quantized attention are fast as they are: its reference compiles to them."""
    return dtype(attention) != torch.float16 or multiplies_float16()
