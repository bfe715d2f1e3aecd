"""What belongs to the process and not to a call: one lock, and the state of torch as it was, by whatever way out.

torch.export, torch.onnx and we ourselves replace functions of torch and of transformers for a while, keep what they are
doing in globals, and give operators other kernels. Two such calls at once see each other's, and the one that ends first
leaves those of the other behind for good.
"""

from __future__ import annotations

import contextlib
import gc
import linecache
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from qcompile.compat import torch as private
from qcompile.compat.dynamo import compile_lock

__all__ = ["alone", "old_objects_rest"]

_ABSENT: Any = object()
_MOST_FAKES = 10_000  # results of operators by their shapes, 300 for a small model, which torch keeps for good


_GROWTH = 1.5  # what the number of objects may grow by before they are all looked through; of Python it is 1.25
_last_count = 0


@contextlib.contextmanager
def old_objects_rest() -> Iterator[None]:
    """Within the body Python looks for garbage among the objects that are made there alone.

    A capture makes so many that Python goes three times through the million that torch and transformers are made of,
    which is a fifth of an export. Garbage among these is found before the body, where they are half more than the last
    time.
    """
    global _last_count
    if gc.get_freeze_count() or not gc.isenabled():  # of a call around this one, or the user's
        yield
        return
    gc.freeze()
    try:
        if gc.get_freeze_count() > _GROWTH * _last_count:
            if _last_count:
                gc.unfreeze()
                gc.collect()
                gc.freeze()
            _last_count = gc.get_freeze_count()
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def alone(*, keep_sources: bool = False) -> Iterator[None]:
    """Be the only thread that traces, lowers or patches, and leave nothing of it behind.

    The lock is the one that Dynamo compiles under: a compilation of its own, in which it calls our back end, and an
    export, in which it may have to compile a branch of `torch.cond`, would each wait for the other's otherwise. A
    thread that has it can take it again. No code of a user but a model's `forward` runs under it: calibration data can
    come from threads, or from a generator that calls qcompile itself.

    Args:
        keep_sources: of the code of graphs, for who runs them: tracebacks show it.
    """
    with compile_lock:
        before = _State()
        try:
            yield
        except BaseException:
            before.put_kernels_back()
            raise
        finally:
            try:
                before.put_back()
            except KeyboardInterrupt:  # a second one
                before.put_back()
                raise
            if not keep_sources:
                before.forget_sources()
            private.forget_old_fakes(_MOST_FAKES)


class _State:
    """What the process was like."""

    def __init__(self) -> None:
        self._replaced = [
            (owner, name, vars(owner).get(name, _ABSENT)) for owner, name in private.replaced_while_tracing()
        ]
        self._filters, self._dtype = warnings.filters, torch.get_default_dtype()
        self._hooks = [set(hooks) for hooks in private.registration_hooks()]
        self._modes = private.count_dispatch_modes()
        self._kernels = {operator: dict(operator.py_kernels) for operator in private.composite_operators()}
        self._fakes: dict[Any, Any] = dict(private.fake_kernels())
        self._sources = set(private.graph_sources())

    def put_back(self) -> None:
        """Undo what something that was cut off has not."""
        for owner, name, value in self._replaced:
            if value is not _ABSENT and getattr(owner, name) is not value:
                setattr(owner, name, value)
        if warnings.filters is not self._filters:
            warnings.filters = self._filters
            with warnings.catch_warnings():  # which tells the half of it that is in C
                pass
        if torch.get_default_dtype() is not self._dtype:
            torch.set_default_dtype(self._dtype)
        for hooks, known in zip(private.registration_hooks(), self._hooks, strict=True):
            for key in [key for key, hook in hooks.items() if key not in known and _is_torch(hook)]:
                hooks.pop(key, None)
        while private.count_dispatch_modes() > self._modes:
            private.pop_dispatch_mode()

    def put_kernels_back(self) -> None:
        """The same for the kernels of operators, which torch replaces one by one to make a program functional.

        Only where that did not end: a module that was imported meanwhile can have brought some that stay.
        """
        for operator, kernels in self._kernels.items():
            if operator.py_kernels != kernels:
                private.set_kernels(operator, kernels)
        fakes = private.fake_kernels()
        for operator in self._kernels:
            if operator in fakes and operator not in self._fakes:
                del fakes[operator]

    def forget_sources(self) -> None:
        """Drop the code of the graphs that were made since: torch.fx keeps it for tracebacks, as long as the process
        lives, and of a model of 9 MB that is half a MB. It runs no more: passes and calibration interpret graphs."""
        sources = private.graph_sources()
        for key in sources.keys() - self._sources:
            sources.pop(key, None)
            linecache.cache.pop(key, None)


def _is_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "torch"
