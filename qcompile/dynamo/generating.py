"""`generate` of a compiled model: torch hands out that of the model inside, which runs that one, in floating point."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from inspect import ismethod
from typing import Any

from torch import nn

from qcompile.compat.dynamo import OptimizedModule, module_inside

# compiled model -> the class of what its `generate` runs on: transformers reads the hints of a class when it is made
_VIEWS: weakref.WeakKeyDictionary[nn.Module, type[nn.Module]] = weakref.WeakKeyDictionary()


def install(ours: Callable[[nn.Module], bool]) -> None:
    """Have `generate` of what `torch.compile(model)` returns call the compiled model.

    Args:
        ours: whether a compiled model is one of this back end; those of others are left as torch has them.
    """
    wrapper: Any = OptimizedModule
    original = wrapper.__getattr__

    @functools.wraps(original)
    def __getattr__(self: nn.Module, name: str) -> Any:
        found = original(self, name)
        if name == "generate" and ismethod(found) and found.__self__ is module_inside(self) and ours(self):
            return found.__func__.__get__(_view(self))
        return found

    wrapper.__getattr__ = __getattr__


def _view(compiled: nn.Module) -> nn.Module:
    """The module inside of `compiled`, with its class, its state and its methods, that runs `compiled` when called.

    It shares the dictionary of attributes: what `generate` keeps from call to call (the length of a static cache) is
    kept, and another thread that calls the module itself sees nothing of it.
    """
    inner: nn.Module = module_inside(compiled)
    kind = _VIEWS.get(compiled)
    if kind is None or kind.__base__ is not type(inner):
        kind = _VIEWS[compiled] = _class_of(type(inner), weakref.ref(compiled))
    view: nn.Module = object.__new__(kind)
    object.__setattr__(view, "__dict__", inner.__dict__)
    return view


def _class_of(base: type[nn.Module], compiled: weakref.ref[nn.Module]) -> type[nn.Module]:
    """A class like `base` whose calls go to `compiled`."""
    run = property(lambda _: compiled().forward)  # type: ignore[union-attr] # a property, as `model.compile()` sets it
    names = {"_compiled_call_impl": run, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), names)
