"""What a command is to the shell that runs it: signals, closed and narrow streams. Nothing imported here takes time."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TextIO

INTERRUPTED = 130
_SAID = "error: interrupted\n"


@dataclass
class Process:
    """What became of the signals that end it.

    Attributes:
        starting: nothing is done yet, and nothing to be put away: a signal ends the process at once. An import that is
            interrupted may raise anything, or leave half a module.
        asked: a signal came.
    """

    starting: bool = True
    asked: bool = False

    def stop(self, _: int, __: FrameType | None) -> None:
        self.asked = True
        if self.starting:
            os.write(2, _SAID.encode())
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    def interrupted(self) -> int:
        sys.stderr.write(_SAID)
        return INTERRUPTED


@contextlib.contextmanager
def as_process() -> Iterator[Process]:
    """SIGTERM is Ctrl-C, a stream that is closed takes what is written, one of ASCII has the rest escaped."""
    process = Process()
    with contextlib.ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number, usual in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
                if signal.getsignal(number) == usual:
                    stack.callback(signal.signal, number, signal.signal(number, process.stop))
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
                stack.callback(setattr, sys, name, None)
            elif isinstance(stream, io.TextIOWrapper):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
        yield process


def nobody_reads(stream: TextIO) -> None:
    """The reader of a pipe, such as `head`, has seen enough: what is still written goes nowhere, without an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Quiet(io.TextIOBase):
    """A stream on which to write is no error when nobody reads any more: what the command does is worth its end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            nobody_reads(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            nobody_reads(self._stream)
