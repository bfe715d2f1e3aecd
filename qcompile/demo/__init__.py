"""The demo: the whole route from training to two engines, on real images and in a few minutes."""

from __future__ import annotations

from qcompile.demo.route import run_demo

__all__ = ["run_demo"]
