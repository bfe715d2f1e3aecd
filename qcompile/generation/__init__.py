"""Text from an ONNX file with a key/value cache, in ONNX Runtime, and what such a file needs beside it."""

from __future__ import annotations

__all__: list[str] = []
