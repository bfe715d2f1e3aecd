"""Private names of torch.compile: Dynamo, AOTAutograd and Inductor. Importing these takes seconds, naming them none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from passes.private import Private, lazily

if TYPE_CHECKING:
    from torch._dynamo import OptimizedModule as OptimizedModule
    from torch._dynamo import config as config
    from torch._dynamo import eval_frame as eval_frame
    from torch._dynamo.callback import CallbackArgs as CallbackArgs
    from torch._dynamo.callback import callback_handler as callback_handler
    from torch._dynamo.convert_frame import compile_lock as compile_lock
    from torch._dynamo.utils import counters as counters
    from torch._inductor.compile_fx import compile_fx as compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
    from torch._inductor.custom_graph_pass import get_hash_for_files as get_hash_for_files
    from torch.fx import Node

_COMPILE, _INDUCTOR = 'torch.compile(backend="qcompile")', "the target inductor of torch.compile"

_NAMES = {
    "compile_lock": Private(
        "torch._dynamo.convert_frame", "compile_lock", "every trace", lambda lock: bool(_can_be_taken_twice(lock))
    ),
    "OptimizedModule": Private(
        "torch._dynamo", "OptimizedModule", "the capture of compiled models", lambda _: _keeps_module()
    ),
    "config": Private("torch._dynamo", "config", _COMPILE, lambda config: config.allow_rnn is False),
    "eval_frame": Private("torch._dynamo", "eval_frame", _COMPILE),
    "counters": Private("torch._dynamo.utils", "counters", _COMPILE, lambda counters: len(counters["nothing"]) == 0),
    "CallbackArgs": Private("torch._dynamo.callback", "CallbackArgs", _COMPILE),
    "callback_handler": Private(
        "torch._dynamo.callback", "callback_handler", _COMPILE, lambda handler: handler.start_callbacks is not None
    ),
    "compile_fx": Private("torch._inductor.compile_fx", "compile_fx", _INDUCTOR),
    "CustomGraphPass": Private("torch._inductor.custom_graph_pass", "CustomGraphPass", _INDUCTOR),
    "get_hash_for_files": Private(
        "torch._inductor.custom_graph_pass",
        "get_hash_for_files",
        _INDUCTOR,
        lambda f: isinstance(f((__file__,)), bytes),
    ),
}
__getattr__, __dir__ = lazily(__name__, _NAMES)


def decomposition_tables() -> tuple[MutableMapping[Any, Any], ...]:
    """Where Inductor looks up how an operator is written with others."""
    from torch._inductor.decomposition import decompositions, fast_random_decomps

    return decompositions, fast_random_decomps()


@contextmanager
def numbers_stay() -> Iterator[None]:
    """Keep AOTAutograd from making tensors of the Python floats in a graph."""
    from torch._functorch._aot_autograd import graph_compile

    module: Any = graph_compile
    original = module.tensorify_python_scalars
    module.tensorify_python_scalars = lambda *_: None
    try:
        yield
    finally:
        module.tensorify_python_scalars = original


def inductor_modes(mode: str | None = None) -> Mapping[str, Any]:
    """Mode of torch.compile -> its settings of Inductor; of one mode those settings."""
    import torch

    return torch._inductor.list_mode_options(mode)


def inductor_settings() -> set[str]:
    """What Inductor can be told: `get_config_copy` leaves aliases out."""
    import torch

    return set(torch._inductor.config._config)  # type: ignore[attr-defined]


def stance() -> str:
    """What `torch.compiler.set_stance` has set."""
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


def skip_reasons() -> list[str] | None:
    """What Dynamo says of functions that it leaves to Python, in this thread; None: nobody keeps it."""
    from torch._dynamo import eval_frame

    return getattr(eval_frame.dynamo_tls, "skip_reasons", None)


def keep_skip_reasons(kept: list[str] | None) -> None:
    """Have Dynamo add what it says of them to `kept`."""
    from torch._dynamo import eval_frame

    eval_frame.dynamo_tls.skip_reasons = kept


def disable(function: Any, reason: str) -> None:
    """Have Dynamo break the graph where `function` is called, with a reason, until `enable`."""
    function._torchdynamo_disable, function._torchdynamo_disable_msg = True, reason


def enable(function: Any) -> None:
    del function._torchdynamo_disable, function._torchdynamo_disable_msg


def module_inside(module: Any) -> Any:
    """What `torch.compile` wrapped in `module`; None if it wrapped nothing."""
    return getattr(module, "_orig_mod", None)


def function_inside(function: Any) -> Any:
    """What `torch.compile` made `function` of; itself if it did not."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def backend_inside(wrapped: Any) -> Any:
    """The back end as the user gave it, of what Dynamo calls."""
    return wrapped._torchdynamo_orig_backend


def backend_of_module(module: Any) -> Any:
    """The back end as the user gave it, of what `torch.compile` made of a module."""
    found = module.dynamo_ctx.callback
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return found


def source(node: Node) -> Any:
    """Where Dynamo found the input that `node` is; None if it says nothing of it."""
    return getattr(node, "_dynamo_source", None)


def set_source(node: Node, found: Any) -> None:
    node._dynamo_source = found


def probes() -> Iterator[Private]:
    """Every private name that this module knows."""
    yield from _NAMES.values()
    yield Private("torch._inductor.decomposition", "decompositions", _INDUCTOR, lambda table: len(table) > 0)
    yield Private("torch._inductor.decomposition", "fast_random_decomps", _INDUCTOR, lambda table: len(table()) > 0)
    yield Private("torch._functorch._aot_autograd.graph_compile", "tensorify_python_scalars", _INDUCTOR)
    yield Private("torch._inductor", "list_mode_options", _COMPILE, lambda modes: "max-autotune" in modes())
    yield Private("torch._inductor.config", "_config", _COMPILE, lambda settings: "max_autotune" in settings)
    yield Private("torch._dynamo.eval_frame", "_stance", _COMPILE, lambda found: isinstance(found.stance, str))
    yield Private("torch._dynamo.eval_frame", "dynamo_tls", _COMPILE)
    yield Private("torch._dynamo.eval_frame", "get_compiler_fn", _COMPILE, _keeps_backend)
    yield Private("torch", "compile", _COMPILE, _module_keeps_backend)
    yield Private("torch._dynamo", "disable", _COMPILE, _disables)


def _can_be_taken_twice(lock: Any) -> bool:
    with lock, lock:
        return True


def _keeps_backend(get_compiler_fn: Any) -> bool:
    def backend(gm: Any, inputs: Any) -> Any:
        return gm

    found = backend_inside(get_compiler_fn(backend))
    return getattr(found, "compiler_fn", found) is backend


def _module_keeps_backend(compile_module: Any) -> bool:
    import torch

    def backend(gm: Any, inputs: Any) -> Any:
        return gm

    found = backend_of_module(compile_module(torch.nn.Identity(), backend=backend))
    return getattr(found, "compiler_fn", found) is backend


def _disables(torch_disable: Any) -> bool:
    """Whether torch itself marks a function so, that Dynamo is to leave alone."""

    def function() -> None:
        pass

    marked = torch_disable(function, reason="because")
    return marked._torchdynamo_disable is True and marked._torchdynamo_disable_msg == "because"


def _keeps_module() -> bool:
    import torch

    module = torch.nn.Identity()
    return module_inside(torch.compile(module)) is module
