"""The decoder that `cache=` asks for."""

from __future__ import annotations

from typing import Any

from qcompile.decoders.options import Cache
from qcompile.decoders.prepare import Decoder, dynamic_decoder, layers_of
from qcompile.decoders.static import static_decoder


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
