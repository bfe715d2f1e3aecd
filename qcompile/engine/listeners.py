"""What listens to a build: the log, of which errors and the layer list are kept, and its progress."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Step = Callable[[str, int, int], None]
"""Called with the name of a phase of the build, the steps done and the steps in all."""


def logger(trt: Any) -> Any:
    """A logger for the package `trt`; afterwards `.errors` and `.layers` hold what it kept."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors and the layer list of a VERBOSE log, which for a large model is tens of megabytes."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.startswith("Layers:"):
                self.layers = message

    return Log()


class Stop:
    """Whether somebody wants the build to end, by Ctrl-C or another signal that Python would raise something for."""

    def __init__(self) -> None:
        self.asked: tuple[int, FrameType | None] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Keep signals until the body ends: what a handler raises in the middle of TensorRT would end the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        kept = {number: handler for number, handler in handlers.items() if callable(handler)}
        for number in kept:
            signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
        if self.asked is not None:
            kept[signal.Signals(self.asked[0])](*self.asked)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number, frame


def monitor(trt: Any, step: Step, stop: Stop) -> Any:
    """A progress monitor for the package `trt` that calls `step`, and cancels the build if `stop` is asked for."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases nest and may run side by side: the newest that is still running is shown."""

        def __init__(self) -> None:
            super().__init__()
            self.running: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.running[phase] = (0, steps)
            self.show()

        def step_complete(self, phase: str, index: int) -> bool:
            if phase in self.running:
                self.running[phase] = (index + 1, self.running[phase][1])
            self.show()
            return stop.asked is None

        def phase_finish(self, phase: str) -> None:
            self.running.pop(phase, None)
            self.show()

        def show(self) -> None:
            if self.running:
                phase, (done, steps) = next(reversed(self.running.items()))
                step(phase, done, steps)

    return Monitor()
