"""One vocabulary: what recipes say, what the IR carries, and how a layer is quantized."""

from __future__ import annotations

from qcompile.schemes.scheme import Scheme
from qcompile.schemes.words import WORDS, FormatName, Granularity, Word

__all__ = ["WORDS", "FormatName", "Granularity", "Scheme", "Word"]
