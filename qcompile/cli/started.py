"""Which of the processes this is that `torchrun` started, by its environment. Nothing imported here takes time."""

from __future__ import annotations

import os


def is_first() -> bool:
    """Whether this process writes and prints: the only one, or the first of those that torchrun started."""
    return not by_torchrun() or os.environ["RANK"] == "0"


def rank() -> str:
    """What errors of one process of several begin with."""
    return "" if is_first() else f"rank {os.environ['RANK']}: "


def by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and {"RANK", "WORLD_SIZE"} <= os.environ.keys()
