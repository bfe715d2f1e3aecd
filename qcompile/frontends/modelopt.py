"""Models of nvidia-modelopt: `modelopt.torch.quantization.quantize`, captured in its export mode or by Dynamo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from qcompile.compat import modelopt as private
from qcompile.errors import CaptureError

__all__ = ["NAMESPACES", "capture_ready", "dynamo_ready", "first_quantizer", "is_quantized"]

NAMESPACES = ("tensorrt", "qcompile_modelopt")
"""Of the operators in graphs that were captured in its export mode, or by Dynamo."""

_substituted: list[Any] = []


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether `model` has quantizers of nvidia-modelopt that are switched on."""
    return first_quantizer(model) is not None


def first_quantizer(model: torch.nn.Module) -> str | None:
    """Path of a quantizer of nvidia-modelopt in `model` that is switched on; None if there is none."""
    switched_on = (name for name, quantizer in _quantizers(model) if not private.is_off(quantizer))
    return next(switched_on, None)


@contextlib.contextmanager
def capture_ready(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Let torch.export see `model` with modelopt's operators; everything is put back on the way out.

    Raises:
        CaptureError: weights that `mtq.compress` stored as codes, or a quantizer that is still calibrating.
    """
    for name, quantizer in _quantizers(model):
        if private.is_off(quantizer):
            continue
        if private.is_calibrating(quantizer):
            raise CaptureError(f"{name} is still calibrating: let modelopt.torch.quantization.quantize finish")
        if private.is_compressed(quantizer):
            raise CaptureError(
                f"{name}: weights compressed by nvidia-modelopt have no floating-point values to capture; capture"
                " before mtq.compress, or export a checkpoint and give it to qcompile.load_checkpoint"
            )
    quantizer_module: Any = private.quantizer_module()
    original = quantizer_module.fake_tensor_quant
    quantizer_module.fake_tensor_quant = _integer_operator
    try:
        with private.export_mode(), _attributes_kept(model):
            yield model
    finally:
        quantizer_module.fake_tensor_quant = original


def dynamo_ready() -> None:
    """Let Dynamo trace through integer quantizers, which branch on values on a CPU, if modelopt is imported.

    It has to be called before Dynamo traces: quantizers that it cut to pieces are an error of `ModeloptToQdq`. What it
    records instead computes the same by modelopt's own function, whatever the back end of torch.compile; outside of
    Dynamo nothing changes. All other quantizers are operators already.
    """
    original: Any = private.integer_function()
    if original is None or original in _substituted:
        return
    _substituted.append(original)

    @torch.library.custom_op(f"{NAMESPACES[1]}::quantize_op", mutates_args=())
    def operator(
        input: torch.Tensor, amax: torch.Tensor, num_bits: int, exponent_bits: int, unsigned: bool, narrow_range: bool
    ) -> torch.Tensor:
        result: torch.Tensor = original(input, amax, num_bits, unsigned, narrow_range)
        return result.clone() if result is input else result

    operator.register_fake(lambda input, *_: torch.empty_like(input))
    opaque = getattr(torch.ops, NAMESPACES[1]).quantize_op

    @torch.compiler.substitute_in_graph(original)
    def recorded(
        inputs: torch.Tensor,
        amax: torch.Tensor,
        num_bits: int = 8,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> torch.Tensor:
        result: torch.Tensor = opaque(inputs, amax, num_bits, 0, unsigned, narrow_range)
        return result


def _quantizers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The quantizers of `model`."""
    for name, module in model.named_modules():
        if private.is_quantizer(module):
            yield name, module


def _integer_operator(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    bias: torch.Tensor | None = None,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
    *_: Any,
) -> torch.Tensor:
    """Integer fake quantization as one operator: what modelopt runs on a CPU branches on values, so it has no graph."""
    shifted = inputs if bias is None else inputs - bias
    result: torch.Tensor = torch.ops.tensorrt.quantize_op(shifted, amax, num_bits, 0, unsigned, narrow_range)
    return result if bias is None else result + bias


@contextlib.contextmanager
def _attributes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Quantizers note what they see (dtypes, shapes of blocks): fake values must not stay behind."""
    kept = [(quantizer, dict(quantizer.__dict__)) for _, quantizer in _quantizers(model)]
    try:
        yield
    finally:
        for quantizer, attributes in kept:
            quantizer.__dict__.clear()
            quantizer.__dict__.update(attributes)
