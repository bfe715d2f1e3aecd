"""Under `torchrun` several processes run a command: they calibrate together, and the first one writes and prints."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from qcompile.cli.data import DataOptions
from qcompile.cli.options import UsageError
from qcompile.cli.started import by_torchrun, is_first


def has_part(options: Mapping[str, Any]) -> bool:
    """Whether this process has something to do for a command with these options: to calibrate, or to write."""
    data = options.get("data")
    return is_first() or (isinstance(data, DataOptions) and data.calibration is not None)


@contextlib.contextmanager
def together(options: Mapping[str, Any]) -> Iterator[None]:
    """A process group for as long as the body runs, if torchrun started several and they have data to share out."""
    data = options.get("data")
    several = by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1
    if not several or not isinstance(data, DataOptions) or data.calibration is None:
        yield
        return
    if options.get("shard") is not None:
        raise UsageError("--shard is for processes that know nothing of each other, and torchrun started these")
    if not is_first():
        logging.getLogger("qcompile").setLevel(logging.ERROR)  # the first one says the same

    from torch import distributed as dist

    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the processes that torchrun started do not find each other: {error}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()
