"""Python's garbage collector beside TensorRT, which calls back into Python with locks held."""

from __future__ import annotations

import contextlib
import gc
import threading
import traceback
from collections.abc import Iterator

_lock = threading.Lock()
_running = 0
_was_enabled = False


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the collector from running, in any thread, while TensorRT builds.

    TensorRT holds the lock of its logger while that logs, which is Python code, and takes the same lock when a builder
    is destroyed. A collection in between that finds a builder in a cycle (pytest and notebooks keep errors with their
    frames) never ends. An error that leaves drops the local variables of its frames, so that whoever keeps it does not
    keep a network and its weights.
    """
    _pause()
    try:
        yield
    except BaseException as error:
        _forget_locals(error)
        raise
    finally:
        _resume()


def _pause() -> None:
    global _running, _was_enabled
    with _lock:
        if not _running:
            _was_enabled = gc.isenabled()
            gc.disable()
        _running += 1


def _resume() -> None:
    global _running
    with _lock:
        _running -= 1
        if not _running and _was_enabled:
            gc.enable()


def _forget_locals(error: BaseException) -> None:
    """Of the frames that have ended, and of those of what caused `error`."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        found = pending.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            pending += [found.__cause__, found.__context__]
