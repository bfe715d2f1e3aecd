"""Calls of a compiled model: what ran in graphs of this back end, and whether that is what the user expects.

Dynamo falls back to Python without an error: at a function that it cannot capture, at a graph break, from the limit of
recompiles on. The back end is not asked then, so each call is looked at when it ends: which layers of the model did
graphs of ours run? A combination of graphs that was found to be right is not looked at again.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn

from qcompile.compat.dynamo import stance
from qcompile.dynamo import torch_layers
from qcompile.dynamo.left import Fallbacks, left_alone
from qcompile.dynamo.models import modules_of
from qcompile.dynamo.options import Options
from qcompile.dynamo.recurrent import REASON as RECURRENT
from qcompile.dynamo.recurrent import BreakAtRecurrent
from qcompile.errors import ExpectationError
from qcompile.messages import some

_SETTLED = 256  # combinations of graphs that are remembered


class _Current(threading.local):
    call: Call | None = None


_current = _Current()


def current_call() -> Call | None:
    """The innermost call of a compiled model that this thread is in."""
    call = _current.call
    while call is not None and call.is_over():
        call = call.outer
    _current.call = call
    return call


_recurrent = BreakAtRecurrent(lambda: current_call() is not None)
torch_layers.install(lambda: current_call() is not None)


class Region:
    """What one `torch.compile(..., backend="qcompile")` compiles: makes the context that Dynamo enters at each call.

    Args:
        given, mode: as `torch.compile` was given them.

    Raises:
        CompileError, RecipeError: of the options, before the model is called.
    """

    def __init__(self, given: Mapping[str, Any] | None, mode: str | None) -> None:
        self.given, self.options = given, Options.read(given, mode)
        self._settled: set[frozenset[int]] = set()

    def __call__(self) -> Call:
        return Call(self)

    def judge(self, call: Call) -> None:
        """Say what of the model ran outside of the graphs of `call`.

        Raises:
            ExpectationError: less than `options.expect` ran quantized.
        """
        if (ran := frozenset(call.ran)) in self._settled or stance() == "force_eager":
            return
        modules = call.modules()
        missing = left_alone(modules, [w for _, weights in call.ran.values() for w in weights], call.fallbacks)
        self._check_expected(call, missing)
        if len(self._settled) == _SETTLED:
            self._settled.clear()
        self._settled.add(ran)

    def _check_expected(self, call: Call, missing: Mapping[str, str]) -> None:
        quantized: dict[tuple[str, str], bool] = {}
        for serial, (layers, _) in call.ran.items():
            for (kind, path), is_quantized in layers.items():
                key = kind, path if call.modules() else f"{serial} {path}"
                quantized[key] = quantized.get(key, False) or is_quantized
        check_expected(quantized, self.options.expect, missing)


def check_expected(
    quantized: Mapping[tuple[str, str], bool], expect: Mapping[str, int], missing: Mapping[str, str]
) -> None:
    """Raises ExpectationError where fewer layers are quantized than a user expects.

    Args:
        quantized: (kind, path) of each layer -> whether it is.
        missing: path of a layer that Dynamo left alone -> why.
    """
    for kind, least in expect.items():
        found = sum(is_quantized for (k, _), is_quantized in quantized.items() if k == kind)
        if found < least:
            total = sum(k == kind for k, _ in quantized)
            total += sum(why != RECURRENT for why in missing.values()) if kind == "linear" else 0
            why = f"; outside of what Dynamo captured are {_listed(missing)}" if missing else ""
            raise ExpectationError(f"{found} of {total} {kind} are quantized, and {least} are expected{why}")


def _listed(missing: Mapping[str, str]) -> str:
    return f"{some(list(missing))} ({next(iter(missing.values()))})"


class Call:
    """One call of what a region compiled.

    Attributes:
        ran: number of a bound graph -> its layers, and the weights that it read.
        fallbacks: where Dynamo fell back to Python meanwhile.
        outer: the call of a compiled model around this one.
    """

    __slots__ = ("_error", "_frame", "_modules", "fallbacks", "outer", "ran", "region")

    def __init__(self, region: Region) -> None:
        self.region = region
        self.ran: dict[int, tuple[Mapping[tuple[str, str], bool], Sequence[Tensor]]] = {}
        self._frame: FrameType | None = None
        self._modules: dict[str, nn.Module] | None = None

    def __enter__(self) -> None:
        self.outer, _current.call = current_call(), self
        self._frame = _caller()
        self._error = sys.exc_info()[1]
        self.fallbacks = Fallbacks()
        _recurrent.watch()

    def __exit__(self, *_: object) -> None:
        _current.call = self.outer
        try:
            self.fallbacks.stop()
            if sys.exc_info()[1] is self._error:  # Dynamo does not say whether the call itself raised one
                self.region.judge(self)
        finally:
            self._frame = self._modules = None
            self.ran.clear()

    def is_over(self) -> bool:
        """Whether the call has returned: Dynamo leaves the context open where its own clean-up raises (to 2.15)."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return self._frame is not None and frame is None

    def modules(self) -> dict[str, nn.Module]:
        """The modules that are called, by their names in what was compiled."""
        if self._modules is None:
            found = self._frame.f_locals if self._frame is not None else {}
            try:
                self._modules = modules_of(found["fn"], found.get("args", ())) if found else {}
            except TypeError:  # no function of Python
                self._modules = {}
        return self._modules


def _caller() -> FrameType | None:
    """The frame of torch that calls the compiled function: it has the function, which no hook is told."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(4):
        if frame is None or "fn" in frame.f_code.co_freevars:
            break
        frame = frame.f_back
    return frame if frame is not None and "fn" in frame.f_code.co_freevars else None
