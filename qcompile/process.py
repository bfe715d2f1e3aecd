"""What belongs to the process and not to a call: one lock, and the state of torch as it was, by whatever way out.

torch.export, torch.onnx and we ourselves replace functions of torch and of transformers for a while, keep what they are
doing in globals, and give operators other kernels. Two such calls at once see each other's, and the one that ends first
leaves those of the other behind for good.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch._dynamo.convert_frame import compile_lock
from torch._export.utils import _materialize_cpp_cia_ops
from torch._ops import OpOverload, OpOverloadPacket, _OpNamespace
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.backends import mha
from torch.export import _trace
from torch.fx import _symbolic_trace, graph_module, traceback
from torch.fx.experimental import proxy_tensor
from torch.nn.modules import module, transformer
from torch.utils import _python_dispatch

__all__ = ["alone"]

_ABSENT: Any = object()
# What is replaced, or set, for as long as something is traced; releases of torch differ in which of them they have.
_REPLACED: tuple[tuple[Any, str], ...] = (
    (sys, "stderr"),
    (torch.nn.Module, "__call__"),
    (torch.nn.Module, "__getattr__"),
    (torch.compiler, "_is_compiling_flag"),
    (torch.compiler, "_is_exporting_flag"),
    (_symbolic_trace, "CURRENT_PATCHER"),
    (_symbolic_trace, "_is_fx_tracing_flag"),
    (_trace, "_EXPORT_FLAGS"),
    (_trace, "_EXPORT_MODULE_HIERARCHY"),
    (mha, "_is_fastpath_enabled"),
    (proxy_tensor, "_CURRENT_MAKE_FX_TRACER"),
    (traceback, "should_preserve_node_meta"),
    (traceback, "_should_preserve_node_meta"),
    (traceback, "current_meta"),
    (transformer, "_detect_is_causal_mask"),
)
_MOST_FAKES = 10_000  # results of operators by their shapes, 300 for a small model, which torch keeps for good
_HOOKS: tuple[Any, ...] = (
    module._global_buffer_registration_hooks,
    module._global_module_registration_hooks,
    module._global_parameter_registration_hooks,
)


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
            if len(FakeTensorMode.cache) > _MOST_FAKES:
                FakeTensorMode.cache_clear()


class _State:
    """What the process was like."""

    def __init__(self) -> None:
        self._replaced = [(owner, name, vars(owner).get(name, _ABSENT)) for owner, name in _REPLACED]
        self._filters, self._dtype = warnings.filters, torch.get_default_dtype()
        self._hooks = [set(hooks) for hooks in _HOOKS]
        self._modes = torch._C._len_torch_dispatch_stack()
        self._kernels = {operator: dict(operator.py_kernels) for operator in _operators()}
        self._fakes: dict[Any, Any] = dict(fake_impls.op_implementations_dict)
        self._sources = set(_sources())

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
        for hooks, known in zip(_HOOKS, self._hooks, strict=True):
            for key in [key for key, hook in hooks.items() if key not in known and _is_torch(hook)]:
                hooks.pop(key, None)
        while torch._C._len_torch_dispatch_stack() > self._modes:
            _python_dispatch._pop_mode()

    def put_kernels_back(self) -> None:
        """The same for the kernels of operators, which torch replaces one by one to make a program functional.

        Only where that did not end: a module that was imported meanwhile can have brought some that stay.
        """
        for operator, kernels in self._kernels.items():
            if operator.py_kernels != kernels:
                operator.py_kernels.clear()
                operator.py_kernels.update(kernels)
                operator._dispatch_cache.clear()
        fakes: dict[Any, Any] = fake_impls.op_implementations_dict
        for operator in self._kernels:
            if operator in fakes and operator not in self._fakes:
                del fakes[operator]

    def forget_sources(self) -> None:
        """Drop the code of the graphs that were made since: torch.fx keeps it for tracebacks, as long as the process
        lives, and of a model of 9 MB that is half a MB. It runs no more: passes and calibration interpret graphs."""
        for key in _sources().keys() - self._sources:
            _sources().pop(key, None)
            linecache.cache.pop(key, None)


def _sources() -> dict[str, str]:
    known: dict[str, str] = graph_module._loader.eval_cache
    return known


def _is_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "torch"


@functools.cache
def _operators() -> tuple[OpOverload[..., Any], ...]:
    """The operators that torch writes with others, whose kernels torch.export replaces; it looks them up, too."""
    _materialize_cpp_cia_ops()
    spaces = [space for space in vars(torch.ops).values() if isinstance(space, _OpNamespace)]
    packets = [packet for space in spaces for packet in vars(space).values() if isinstance(packet, OpOverloadPacket)]
    found = [known for packet in packets for known in vars(packet).values() if isinstance(known, OpOverload)]
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    names = set(torch._C._dispatch_get_registrations_for_dispatch_key(key.name))
    return tuple(known for known in found if key in known.py_kernels or known.name() in names)  # type: ignore[no-untyped-call]
