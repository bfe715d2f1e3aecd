"""What listens to a build: the log, of which errors and the layer list are kept, and its progress."""

from __future__ import annotations

from collections.abc import Callable
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


def monitor(trt: Any, step: Step) -> Any:
    """A progress monitor for the package `trt` that calls `step`."""

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
            return True  # False would cancel the build

        def phase_finish(self, phase: str) -> None:
            self.running.pop(phase, None)
            self.show()

        def show(self) -> None:
            if self.running:
                phase, (done, steps) = next(reversed(self.running.items()))
                step(phase, done, steps)

    return Monitor()
