"""Private names of torch outside of its compiler: tracing, saved programs, and torch's own transformer layers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from passes.private import Private, lazily

if TYPE_CHECKING:
    import torch
    from torch._C import PyTorchFileReader as PyTorchFileReader
    from torch._guards import TracingContext as TracingContext
    from torch._guards import tracing as tracing
    from torch._ops import OpOverload
    from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor
    from torch._subclasses.functional_tensor import FunctionalTensorMode as FunctionalTensorMode
    from torch.export.pt2_archive._package import load_pt2 as load_pt2
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass

_TRACE, _SAVED, _ALONE = "a trace for torch.compile", "reading a .pt2 file", "putting torch back after a trace"
_LAYERS = "the capture of torch's transformer layers"

_NAMES = {
    "PyTorchFileReader": Private("torch._C", "PyTorchFileReader", _SAVED),
    "load_pt2": Private("torch.export.pt2_archive._package", "load_pt2", _SAVED),
    "TracingContext": Private("torch._guards", "TracingContext", _TRACE, lambda c: c.try_get() is None),
    "tracing": Private("torch._guards", "tracing", _TRACE),
    "FunctionalTensor": Private("torch._subclasses.functional_tensor", "FunctionalTensor", _TRACE),
    "FunctionalTensorMode": Private("torch._subclasses.functional_tensor", "FunctionalTensorMode", _TRACE),
    "enter_autocast": Private("torch.amp.autocast_mode", "_enter_autocast", _TRACE),
    "exit_autocast": Private("torch.amp.autocast_mode", "_exit_autocast", _TRACE),
    "check_size": Private("torch", "_check", "the capture of decoders"),
    "is_traceable_wrapper_subclass": Private(
        "torch.utils._python_dispatch", "is_traceable_wrapper_subclass", "reading the weights of torchao"
    ),
}
__getattr__, __dir__ = lazily(__name__, _NAMES)


def functional_value(tensor: torch.Tensor) -> torch.Tensor:
    """What the `elem` of a `FunctionalTensor` holds, with all that was written to it."""
    import torch

    torch._functionalize_sync(tensor)
    result: torch.Tensor = torch._from_functional_tensor(tensor)
    return result


def set_grad_enabled() -> Any:
    """What graphs of Dynamo call where a model says `torch.no_grad()`."""
    import torch

    return torch._C._set_grad_enabled


def linear_of_graphs() -> Any:
    """What graphs of Dynamo call where a model says `torch.nn.functional.linear`."""
    import torch

    return torch._C._nn.linear


def without_autocast() -> Any:
    """A context in which nothing is cast, and which takes no time to enter."""
    import torch

    return torch._C._DisableAutocast()


def is_one_gone(handles: Iterable[int]) -> bool:
    """Whether a storage behind one of these handles, each of a `StorageWeakRef`, is freed."""
    import torch

    return any(map(torch.UntypedStorage._expired, handles))


def has_composite_kernel(operator: OpOverload[..., Any]) -> bool:
    """Whether torch itself writes `operator` with others."""
    import torch

    return operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


@contextmanager
def causal_test(test: Callable[..., bool]) -> Iterator[None]:
    """Within the body `nn.Transformer` and its layers ask `test` whether a mask is causal, and run part by part."""
    import torch
    from torch.nn.modules import transformer

    original, is_fast = transformer._detect_is_causal_mask, torch.backends.mha._is_fastpath_enabled
    try:
        transformer._detect_is_causal_mask = test
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        transformer._detect_is_causal_mask = original
        torch.backends.mha.set_fastpath_enabled(is_fast)


def original_causal_test() -> Any:
    """torch's own test of a mask."""
    from torch.nn.modules import transformer

    return transformer._detect_is_causal_mask


def replaced_while_tracing() -> tuple[tuple[Any, str], ...]:
    """What torch replaces, or sets, for as long as something is traced: (owner, name of its attribute).

    Releases differ in which of them they have; what one has not, it has nothing to put back of.
    """
    import torch
    from torch.backends import mha
    from torch.export import _trace
    from torch.fx import _symbolic_trace, traceback
    from torch.fx.experimental import proxy_tensor
    from torch.nn.modules import transformer

    return (
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


def registration_hooks() -> tuple[MutableMapping[int, Any], ...]:
    """The hooks that all modules call when something is registered with them."""
    from torch.nn.modules import module

    return (
        module._global_buffer_registration_hooks,
        module._global_module_registration_hooks,
        module._global_parameter_registration_hooks,
    )


def count_dispatch_modes() -> int:
    """How many modes stand between a call of an operator and its kernel in this thread."""
    import torch

    return torch._C._len_torch_dispatch_stack()


def pop_dispatch_mode() -> None:
    from torch.utils import _python_dispatch

    _python_dispatch._pop_mode()


def fake_kernels() -> MutableMapping[Any, Any]:
    """Operator -> how it computes with fake tensors, where torch knows that of it alone."""
    from torch._subclasses import fake_impls

    return fake_impls.op_implementations_dict


def forget_old_fakes(most: int) -> None:
    """Empty the table of results of operators by the shapes of fake tensors, once it has more than `most`."""
    from passes.compat import FakeTensorMode

    if len(FakeTensorMode.cache) > most:
        FakeTensorMode.cache_clear()


def graph_sources() -> MutableMapping[str, str]:
    """Name of a graph's file -> its code, which torch.fx keeps for tracebacks."""
    from torch.fx import graph_module

    return graph_module._loader.eval_cache


def set_kernels(operator: OpOverload[..., Any], kernels: MutableMapping[Any, Any]) -> None:
    """Give `operator` these kernels of Python and no others."""
    operator.py_kernels.clear()
    operator.py_kernels.update(kernels)
    operator._dispatch_cache.clear()


@functools.cache
def composite_operators() -> tuple[OpOverload[..., Any], ...]:
    """The operators that torch writes with others, whose kernels torch.export replaces; it looks them up, too."""
    import torch
    from torch._export.utils import _materialize_cpp_cia_ops
    from torch._ops import OpOverload, OpOverloadPacket, _OpNamespace

    _materialize_cpp_cia_ops()
    spaces = [space for space in vars(torch.ops).values() if isinstance(space, _OpNamespace)]
    packets = [packet for space in spaces for packet in vars(space).values() if isinstance(packet, OpOverloadPacket)]
    found = [known for packet in packets for known in vars(packet).values() if isinstance(known, OpOverload)]
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    names = set(torch._C._dispatch_get_registrations_for_dispatch_key(key.name))
    return tuple(known for known in found if key in known.py_kernels or known.name() in names)  # type: ignore[no-untyped-call]


def probes() -> Iterator[Private]:
    """Every private name that this module knows."""
    yield from _NAMES.values()
    yield Private("torch", "_functionalize_sync", _TRACE)
    yield Private("torch", "_from_functional_tensor", _TRACE)
    yield Private("torch._C", "_set_grad_enabled", _TRACE)
    yield Private("torch._C", "_nn.linear", "reading the weights of torchao")
    yield Private("torch._C", "_DisableAutocast", "a call of a compiled graph", lambda context: bool(context()) or True)
    yield Private("torch", "UntypedStorage._expired", "a call of a compiled graph", _knows_the_dead)
    yield Private("torch.nn.modules.transformer", "_detect_is_causal_mask", _LAYERS, _finds_causal)
    yield Private("torch.backends.mha", "_is_fastpath_enabled", _LAYERS, lambda flag: isinstance(flag, bool))
    yield Private("torch.nn", "Module._save_to_state_dict", "save_checkpoint")
    for table in ("parameters", "buffers", "modules", "forward_hooks", "forward_pre_hooks"):
        yield Private("torch.nn", "Module", f"reading _{table} of a model", functools.partial(_has_table, f"_{table}"))
    for name in ("buffer", "module", "parameter"):
        yield Private("torch.nn.modules.module", f"_global_{name}_registration_hooks", _ALONE)
    yield Private("torch._C", "_len_torch_dispatch_stack", _ALONE, lambda count: isinstance(count(), int))
    yield Private("torch.utils._python_dispatch", "_pop_mode", _ALONE)
    yield Private("torch._subclasses.fake_impls", "op_implementations_dict", _ALONE, lambda table: len(table) > 0)
    yield Private("torch._subclasses.fake_tensor", "FakeTensorMode.cache", _ALONE, lambda cache: len(cache) >= 0)
    yield Private("torch._subclasses.fake_tensor", "FakeTensorMode.cache_clear", _ALONE, callable)
    yield Private("torch.fx.graph_module", "_loader.eval_cache", _ALONE, lambda cache: isinstance(cache, dict))
    yield Private("torch._export.utils", "_materialize_cpp_cia_ops", _ALONE)
    yield Private("torch._ops", "_OpNamespace", _ALONE)
    yield Private("torch._ops", "OpOverload.has_kernel_for_dispatch_key", "the route of Torch-TensorRT")
    yield Private("torch._C", "_dispatch_get_registrations_for_dispatch_key", _ALONE)
    yield Private("torch.export._trace", "_export", _ALONE)
    yield Private("torch.fx._symbolic_trace", "CURRENT_PATCHER", _ALONE)


def _knows_the_dead(_: Any) -> bool:
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    tensor = torch.empty(4)
    weak: Any = StorageWeakRef
    reference = weak(tensor.untyped_storage())
    alive = not is_one_gone([reference.cdata])
    del tensor
    return alive and is_one_gone([reference.cdata])


def _finds_causal(test: Any) -> bool:
    import torch

    mask = torch.full((3, 3), float("-inf")).triu(1)
    return test(mask, None, 3) is True and test(torch.zeros(3, 3), None, 3) is False


def _has_table(name: str, module: Any) -> bool:
    return isinstance(vars(module()).get(name), dict)
