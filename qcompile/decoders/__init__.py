"""Decoders that generate: a model of transformers with its key/value cache as inputs and outputs."""

from __future__ import annotations

from qcompile.decoders.choose import decoder_of
from qcompile.decoders.options import Cache, as_cache
from qcompile.decoders.prepare import Decoder

__all__ = ["Cache", "Decoder", "as_cache", "decoder_of"]
