"""Layers to write, and a checkpoint that went through bytes and JSON on its way back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch

from passes.formats import FP8, FP8_128X128, FP8_PER_TOKEN, INT4_GROUPS, INT8, INT8_PER_TOKEN, MXFP4, MXFP8, NVFP4
from passes.ir import block_numbers, dynamic_quantize, quantize
from qcompile.checkpoint.formats import FORMATS, CheckpointFormat, Contents, SchemeReader
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import FP8_BLOCK, FP8_CHANNEL_TOKEN, FP8_TENSOR, INT8_CHANNEL_TOKEN, NVFP4_W4A4, Scheme

BLOCK_WEIGHT_ONLY = Scheme(FP8_128X128)
NVFP4_WEIGHT_ONLY = Scheme(NVFP4)
MX = [Scheme(MXFP8, MXFP8), Scheme(MXFP8), Scheme(MXFP4, MXFP4), Scheme(MXFP4)]
INT4 = [Scheme(fmt) for fmt in INT4_GROUPS.values()]
HELD = {
    "fp8": [FP8_BLOCK],
    "modelopt": [FP8_TENSOR, FP8_CHANNEL_TOKEN, BLOCK_WEIGHT_ONLY, NVFP4_W4A4, NVFP4_WEIGHT_ONLY, *INT4, MX[0]],
    "modelopt_mixed": [FP8_TENSOR, FP8_CHANNEL_TOKEN, BLOCK_WEIGHT_ONLY, NVFP4_W4A4, NVFP4_WEIGHT_ONLY, *INT4, MX[0]],
    "compressed-tensors": [
        FP8_TENSOR,
        FP8_CHANNEL_TOKEN,
        FP8_BLOCK,
        BLOCK_WEIGHT_ONLY,
        NVFP4_W4A4,
        NVFP4_WEIGHT_ONLY,
        INT8_CHANNEL_TOKEN,
        Scheme(FP8),
        Scheme(FP8, per_channel=True),
        Scheme(FP8, FP8, per_channel=True),
        Scheme(FP8, FP8_PER_TOKEN),
        Scheme(INT8, INT8),
        Scheme(INT8, INT8, per_channel=True),
        Scheme(INT8, INT8_PER_TOKEN),
        *INT4,
        *MX,
    ],
}
PAIRS = [(name, scheme) for name, schemes in HELD.items() for scheme in schemes]


def quantized(scheme: Scheme, weight: torch.Tensor) -> QuantizedWeight:
    """`weight` `[N, K]` in `scheme`, with scales from its own largest magnitudes."""
    fmt = scheme.weight
    input_scale = torch.tensor(0.0123) if scheme.has_input_scale else None
    if fmt.scale is not None:
        global_scale = weight.abs().amax() / fmt.global_max
        codes, scale = dynamic_quantize(weight, global_scale, format=fmt.name)
        return QuantizedWeight(scheme, codes, scale, global_scale, input_scale)
    if fmt.sizes:
        scale = block_numbers(weight, fmt)
    else:
        scale = (weight.abs().amax(-1, keepdim=True) if scheme.per_channel else weight.abs().amax()) / fmt.max
    return QuantizedWeight(scheme, quantize(weight, scale, format=fmt.name), scale, None, input_scale)


def through_file(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What safetensors makes of them."""
    return safetensors.torch.load(safetensors.torch.save(dict(tensors)))


def reader_for(fmt: CheckpointFormat, contents: Contents) -> SchemeReader:
    """A reader of the configuration that `fmt` writes."""
    files = json.loads(json.dumps(fmt.files(contents)))
    return fmt.reader(files["config.json"]["quantization_config"], files)


def reader_of_config(section: Mapping[str, Any], **files: Mapping[str, Any]) -> SchemeReader:
    """A reader of someone else's configuration."""
    method = str(section.get("quant_method", "modelopt"))
    return FORMATS[method].reader(section, files)


def assert_same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> None:
    """Equal dtype, shape and bits."""
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
