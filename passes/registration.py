"""The operators of the IR are torch's as soon as torch is there: a saved program is made of them.

Importing this package imports no torch, which takes seconds, and `torch.export.load` finds the operators all the same,
whichever is imported first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_OPERATORS = "passes.ir"


def register() -> None:
    """Register the operators now, or when torch has been imported."""
    if "torch" in sys.modules:
        importlib.import_module(_OPERATORS)
    else:
        sys.meta_path.insert(0, _AfterTorch())


class _AfterTorch(MetaPathFinder):
    """Steps aside when it is asked for torch, and has the operators imported behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads as another loader does, and imports the operators."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # as if nobody had been here
        self._loader.exec_module(module)
        if not any(_begun(name) for name in list(sys.modules) if name.startswith("passes.")):
            importlib.import_module(_OPERATORS)


def _begun(name: str) -> bool:
    """Whether a module is in the middle of its import, which the operators may need: who began with it, goes on."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))
