"""The decoder that `cache=` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram

from qcompile.capture import capture
from qcompile.decoders.encoder_decoder import captured_part, is_encoder_decoder
from qcompile.decoders.options import Cache
from qcompile.decoders.prepare import Decoder, dynamic_decoder, layers_of
from qcompile.decoders.static import static_decoder
from qcompile.errors import CaptureError


def decoder_of(model: Any, cache: Cache) -> Decoder:
    """`model` with its cache.

    Raises:
        CaptureError: it is no decoder of transformers, keeps another state than keys and values, or has fewer positions
            than the cache is long.
    """
    layers, last = layers_of(model), cache.logits == "last"
    if cache.length is None:
        return dynamic_decoder(model, layers, last=last)
    return static_decoder(model, layers, cache.length, last=last)


def captured_with_cache(
    model: Any,
    cache: Cache,
    calibration: Any,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[ExportedProgram, Any]:
    """The program of `model` with its cache, and `calibration` as it takes it.

    Args:
        kwargs: example inputs of the encoder of a model that has one.

    Raises:
        CaptureError: as of `decoder_of`, and for sizes: those of a decoder are known.
    """
    if dynamic_shapes is not None:
        raise CaptureError("with cache= the batch, the new tokens and the past are dynamic: leave dynamic_shapes out")
    if cache.part is not None or is_encoder_decoder(model):
        return captured_part(model, cache, calibration, kwargs)
    decoder = decoder_of(model, cache)
    program = capture(decoder.module, (), decoder.kwargs, dynamic_shapes=decoder.dynamic_shapes)
    return program, decoder.batches(calibration)
