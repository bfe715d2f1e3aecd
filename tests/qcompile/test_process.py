"""Threads and interrupts: what is written is what one thread writes, and nothing of the process is left changed."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import io
import linecache
import logging
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.convert_frame import compile_lock
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses import fake_impls
from torch.backends import mha
from torch.fx import graph_module
from torch.nn.modules import module, transformer

import qcompile
from qcompile.checkpoint.hub.config import auto_config, import_transformers
from qcompile.errors import CaptureError, CheckpointError

RECIPES = ("fp8", "int8", "fp8_per_channel_per_token", "fp8_weight_only")


class Layer(nn.Module):
    """Weights, a buffer and a dropout, as small as can be.

    Args:
        then: is called with what it computes.
    """

    def __init__(self, width: int, then: Callable[[torch.Tensor], Any] | None = None) -> None:
        super().__init__()
        self.hidden, self.dropout = nn.Linear(width, width), nn.Dropout()
        self.out = nn.Linear(width, width)
        self.register_buffer("shift", torch.ones(width))
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.out(self.dropout(self.hidden(x).relu())) + self.shift
        if self.then is not None:
            self.then(x)
        return x


def model_of(index: int) -> tuple[Layer, torch.Tensor]:
    torch.manual_seed(index)
    return Layer(32 * (1 + index)), torch.randn(1, 3, 32 * (1 + index))


def exported(program: Any, path: Path) -> bytes:
    qcompile.export_onnx(program, path, target="portable")
    return path.read_bytes()


def quantized(model: nn.Module, x: torch.Tensor, recipe: str = "fp8", calibration: Any = None) -> Any:
    return qcompile.quantize(model, (x,), recipe=recipe, calibration=calibration or [(x,)], progress=False)


def job(index: int, path: Path, model: Any, x: torch.Tensor) -> bytes:
    """What a thread does over and over, each its own; the last one compiles a new model each time."""
    if index == 3:
        return bytes(model()(x).detach().numpy().data)
    program = quantized(model, x, RECIPES[index])
    return exported(qcompile.import_quantized(program) if index == 2 else program, path)


def process() -> dict[str, Any]:
    """What a call can leave behind. Operators and loggers that are there later only are none of it."""
    packets = [packet for packet in vars(torch.ops.aten).values() if isinstance(packet, OpOverloadPacket)]
    overloads = [found for packet in packets for found in vars(packet).values() if isinstance(found, OpOverload)]
    return {
        "patched": (nn.Module.__call__, nn.Module.__getattr__, transformer._detect_is_causal_mask, sys.stderr),
        "hooks": [dict(hooks) for hooks in (module._global_buffer_registration_hooks, module._global_forward_hooks)],
        "filters": (id(warnings.filters), list(warnings.filters)),
        "levels": {name: logging.getLogger(name).level for name in list(logging.root.manager.loggerDict)},
        "flags": (mha._is_fastpath_enabled, torch.compiler._is_exporting_flag, torch.is_grad_enabled()),
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "dtype": torch.get_default_dtype(),
        "kernels": {str(found): dict(found.py_kernels) for found in overloads},
        "fakes": len(fake_impls.op_implementations_dict),
    }


def parts(model: nn.Module) -> list[Any]:
    """The attributes of all modules, and their weights."""
    found = [(name, dict(vars(part)), list(map(id, part.parameters()))) for name, part in model.named_modules()]
    return [(name, vars_.keys(), vars_["training"], weights) for name, vars_, weights in found]


@pytest.fixture(scope="module", autouse=True)
def _once() -> None:
    """What torch does once in a process: kernels of Inductor's, for one, stay."""
    importlib.import_module("torch._inductor.decomposition")
    quantized(*model_of(0))


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    before = process()
    yield
    after = process()
    for name in ("levels", "kernels"):
        after[name] = {key: value for key, value in after[name].items() if key in before[name]}
    for name, state in before.items():
        assert after[name] == state


def in_threads(works: list[Callable[[], object]]) -> None:
    """Run all of `works`. An error of one is raised, and it is one that two wait for each other."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(1800)
        assert not thread.is_alive(), "two threads wait for each other"
    for error in errors:
        raise error


@pytest.mark.parametrize(("jobs", "rounds"), [((0, 1), 2), pytest.param((0, 1, 2, 3), 20, marks=pytest.mark.slow)])
def test_threads_write_what_one_thread_writes(jobs: tuple[int, ...], rounds: int, tmp_path: Path) -> None:
    models: list[tuple[Any, torch.Tensor]] = [model_of(index) for index in range(4)]
    last = models[3][0]
    # torch does not compile what is handed to torch.compile while anything is exported, and warns; calls are safe
    options = {"recipe": "fp8_per_channel_per_token", "target": "eager"}
    copies = [copy.deepcopy(last).eval() for _ in range(rounds + 1)]
    compiled = [torch.compile(model, backend="qcompile", options=options) for model in copies]
    models[3] = (compiled.pop, models[3][1])
    alone = {index: job(index, tmp_path / "alone.onnx", *models[index]) for index in jobs}
    found: dict[int, list[bytes]] = {index: [] for index in jobs}

    def repeated(index: int) -> None:
        found[index] += [job(index, tmp_path / f"{index}.onnx", *models[index]) for _ in range(rounds)]

    in_threads([functools.partial(repeated, index) for index in jobs])
    same = {index: [file == alone[index] for file in files] for index, files in found.items()}
    assert same == {index: [True] * rounds for index in jobs}
    assert all(model.training for model, _ in models[:3])


def test_calibration_may_call_qcompile_and_come_from_threads(tmp_path: Path) -> None:
    model, x = model_of(0)
    other = model_of(1)

    def nested() -> Iterator[torch.Tensor]:
        quantized(*other)
        in_threads([lambda: exported(quantized(*other), tmp_path / "other.onnx")])
        yield x

    found: list[bytes] = []
    in_threads([lambda: found.append(exported(quantized(model, x, calibration=nested()), tmp_path / "nested.onnx"))])
    assert found == [exported(quantized(model, x), tmp_path / "plain.onnx")]


def test_an_export_and_a_compilation_share_one_lock(tmp_path: Path) -> None:
    """Dynamo holds its own while it waits for the back end, and an export may need that for a branch."""
    held: list[bool] = []

    def taken_elsewhere() -> None:
        free = compile_lock.acquire(blocking=False)
        held.append(not free)
        if free:
            compile_lock.release()

    def then(_: torch.Tensor) -> None:
        in_threads([taken_elsewhere])

    torch.manual_seed(0)
    model = Layer(32, then)
    program = quantized(
        model, torch.randn(1, 3, 32), calibration=map(lambda x: (then(x), x)[1], [torch.ones(1, 3, 32)])
    )
    assert held and not held[-1]  # while it calibrates
    assert all(held[:-1]) and len(held) > 1  # while it traces
    assert exported(program, tmp_path / "model.onnx")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_model_leaves_behind_is_put_back(error: type[BaseException]) -> None:
    """The hook is what torch 2.11 leaves of each export that fails."""

    def leave(_: torch.Tensor) -> None:
        hook = module.register_module_buffer_registration_hook(lambda *_: None)
        module._global_buffer_registration_hooks[hook.id].__module__ = "torch._functorch._aot_autograd.utils"
        warnings.filters = [*warnings.filters]
        torch.set_default_dtype(torch.float64)
        sys.stderr = io.StringIO()
        model.left = 1
        raise error("cut off")

    model = Layer(32, leave)
    before = parts(model)
    with pytest.raises(CaptureError if error is ValueError else error):
        quantized(model, torch.randn(1, 3, 32))
    assert parts(model) == before


# The call of this function of torch, or of ours, at which Ctrl-C comes, and after how many of its calls.
INTERRUPTS = [
    ("py_impl", 15),  # kernels of operators are replaced
    ("_deregister_op_impl", 2),  # and put back
    ("register_buffer_assignment_hook", 0),
    ("swap_tensor", 5),  # weights are replaced by fake ones
    ("revert_all_patches", 0),  # Module.__call__ is put back
    ("set_fastpath_enabled", 0),
    ("set_fastpath_enabled", 1),
    ("train", 3),
    ("simplefilter", 0),
    ("_translate_fx_graph", 0),
    ("setLevel", 2),
]


@pytest.mark.parametrize(("name", "calls"), INTERRUPTS, ids=lambda value: str(value))
@pytest.mark.everyday(3)
@pytest.mark.parametrize("event", ["call", "return"])
def test_an_interrupt_leaves_the_process_as_it_was(name: str, calls: int, event: str, tmp_path: Path) -> None:
    model, x = model_of(0)
    before, left = parts(model), [calls]

    def interrupt(frame: FrameType, found: str, _: Any) -> None:
        if found == event and frame.f_code.co_name == name:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

    sys.setprofile(interrupt)
    try:
        exported(quantized(model, x), tmp_path / "model.onnx")
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    if left == [calls]:
        pytest.skip(f"this release of torch has no {name}")
    assert left == [-1], "it was never called so often"
    assert parts(model) == before


def test_no_code_of_graphs_stays(tmp_path: Path) -> None:
    def lines() -> int:
        return sum(name.startswith("<eval_with_key>") for name in linecache.cache)

    before = len(graph_module._loader.eval_cache), lines()
    exported(quantized(*model_of(0)), tmp_path / "model.onnx")
    assert (len(graph_module._loader.eval_cache), lines()) == before


def test_transformers_is_silenced_for_the_time_of_a_call(tmp_path: Path) -> None:
    transformers = import_transformers(CheckpointError)
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    found: Any = transformers.utils.logging
    before = found.get_verbosity()
    found.set_verbosity_info()
    found.enable_progress_bar()
    try:
        with pytest.raises(CheckpointError, match="cannot use it"):
            auto_config(import_transformers(CheckpointError), tmp_path, CheckpointError)
        assert (found.get_verbosity(), found.is_progress_bar_enabled()) == (found.INFO, True)
    finally:
        found.set_verbosity(before)


@pytest.fixture
def unfrozen() -> Iterator[None]:
    """As a process is at its start; `conftest` freezes what all tests import."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("unfrozen")
def test_garbage_is_looked_for_among_new_objects_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resting: list[int] = []
    model, x = model_of(0)
    model.then = lambda _: resting.append(gc.get_freeze_count())
    program = qcompile.quantize(model, (x,), recipe="nvfp4_weight_only", progress=False)
    assert min(resting) > 10_000 and gc.get_freeze_count() == 0
    cycle = model_of(1)[0]
    cycle.then = cycle.forward
    gone = weakref.ref(cycle)
    gc.freeze()  # by the user: it stays as it is
    del cycle
    qcompile.export_onnx(program, tmp_path / "model.onnx")
    assert gc.get_freeze_count() > 10_000 and gone() is not None
    gc.unfreeze()
    monkeypatch.setattr("qcompile.process._last_count", 1)  # there are more than half more objects than that
    qcompile.export_onnx(program, tmp_path / "model.onnx")
    assert gc.get_freeze_count() == 0 and gone() is None
