"""Decoders that generate: a model of transformers with its key/value cache as inputs and outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.lazy import public

if TYPE_CHECKING:
    from qcompile.decoders.choose import captured_with_cache, decoder_of
    from qcompile.decoders.options import Cache, as_cache
    from qcompile.decoders.prepare import Decoder
    from qcompile.decoders.steps import ProgramRun, has_cache

__all__ = ["Cache", "Decoder", "ProgramRun", "as_cache", "captured_with_cache", "decoder_of", "has_cache"]

_PLACES = {
    "Cache": "qcompile.decoders.options",
    "Decoder": "qcompile.decoders.prepare",
    "ProgramRun": "qcompile.decoders.steps",
    "as_cache": "qcompile.decoders.options",
    "captured_with_cache": "qcompile.decoders.choose",
    "decoder_of": "qcompile.decoders.choose",
    "has_cache": "qcompile.decoders.steps",
}

__getattr__, __dir__ = public(__name__, _PLACES)
