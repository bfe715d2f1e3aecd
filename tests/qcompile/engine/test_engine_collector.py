"""The garbage collector while TensorRT builds: it would wait for a lock that the builder holds."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qcompile.engine import build_engine, listeners, trt_build
from qcompile.engine.collector import undisturbed
from qcompile.errors import EngineError


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    assert gc.isenabled()
    yield
    assert gc.isenabled()


def test_nested_and_side_by_side() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with undisturbed():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with undisturbed():
        with undisturbed():
            assert not gc.isenabled()
        thread.start()
        assert inside.wait(10)
        assert not gc.isenabled()
    assert not gc.isenabled()  # the other still builds
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with undisturbed():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_lets_go_of_what_it_passed() -> None:
    class Large:
        pass

    kept: list[weakref.ref[Large]] = []

    def cause() -> None:
        network = Large()
        kept.append(weakref.ref(network))
        raise KeyError("cause")

    def fail() -> None:
        network = Large()
        kept.append(weakref.ref(network))
        try:
            cause()
        except KeyError as error:
            raise EngineError("refused") from error

    with pytest.raises(EngineError, match="refused") as caught, undisturbed():
        fail()
    assert isinstance(caught.value.__cause__, KeyError) and len(kept) == 2
    assert [reference() for reference in kept] == [None, None]


def test_every_line_of_the_log_comes_undisturbed(block_file: Callable[..., Path], monkeypatch: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    states: list[bool] = []

    def logger(trt: Any) -> Any:
        made = listeners.logger(trt)

        class Watching(type(made)):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                states.append(gc.isenabled())
                super().log(severity, message)

        return Watching()

    monkeypatch.setattr(trt_build, "logger", logger)
    build_engine(block_file("fp8"), target="sm89", progress=False)
    assert len(states) > 100 and not any(states)


def test_a_kept_error_keeps_no_builder(block_file: Callable[..., Path], monkeypatch: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    loggers: list[weakref.ref[Any]] = []

    def logger(trt: Any) -> Any:
        made = listeners.logger(trt)
        loggers.append(weakref.ref(made))
        return made

    monkeypatch.setattr(trt_build, "logger", logger)
    with pytest.raises(EngineError) as caught:
        build_engine(block_file("fp8"), target="sm89", progress=False, profiles={"nothing": ((1,), (1,), (1,))})
    assert caught.value and len(loggers) == 1 and loggers[0]() is None
