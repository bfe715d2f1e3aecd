"""Decoders that generate: a model of transformers with its key/value cache as inputs and outputs."""

from __future__ import annotations

from qcompile.decoders.choose import captured_with_cache, decoder_of
from qcompile.decoders.options import Cache, as_cache
from qcompile.decoders.prepare import Decoder
from qcompile.decoders.steps import ProgramRun, has_cache

__all__ = ["Cache", "Decoder", "ProgramRun", "as_cache", "captured_with_cache", "decoder_of", "has_cache"]
