"""A model as a graph: without its wrappers, with inputs that are nothing but inputs, and checked for what is wrong."""

from __future__ import annotations

from qcompile.capture.export import capture
from qcompile.capture.unwrap import unwrapped

__all__ = ["capture", "unwrapped"]
