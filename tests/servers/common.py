"""What the loaders need: packages that only a GPU machine has, and what of a checkpoint arrived in a model."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file


class _Kind(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Anything(metaclass=_Kind):
    """Stands for an object of a package with kernels: it can be called, be indexed and decorate, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], (types.FunctionType, type, classmethod, staticmethod)):
            return args[0]
        return Anything()

    def __class_getitem__(cls, key: Any) -> Any:
        return cls

    def __getitem__(self, key: Any) -> Any:
        return Anything()

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __lt__(self, other: Any) -> bool:
        return False

    __gt__ = __le__ = __ge__ = __lt__

    def __bool__(self) -> bool:
        return False

    def __or__(self, other: Any) -> Any:
        return Anything()

    __ror__ = __or__


class _Package(types.ModuleType):
    __path__: ClassVar[list[str]] = []
    __version__ = "99.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Kind(name, (Anything,), {}) if name[0].isupper() else Anything()
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == own or name.startswith(f"{own}.") for own in self._names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Package(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


def without_kernels(*names: str) -> None:
    """Let these packages import although they are not there: what they compute is no part of loading."""
    sys.meta_path.insert(0, _Finder(names))


def lost(
    directory: str, tensors: Iterable[torch.Tensor], read: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
) -> list[str]:
    """The tensors of the checkpoint whose bytes are in none of `tensors`, those of the key/value cache aside.

    Args:
        tensors: those of the model.
        read: what the loader makes of a stored tensor before it is in the model.
    """
    held = [_bytes(tensor.data) for tensor in tensors if tensor.numel()]
    stored = {name: t for file in Path(directory).glob("*.safetensors") for name, t in load_file(file).items()}
    weights = {name: read(t) for name, t in stored.items() if not name.endswith((".k_scale", ".v_scale"))}
    return [name for name, tensor in weights.items() if not any(_bytes(tensor) in there for there in held)]


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def report(judge: Callable[[str], list[str]]) -> None:
    """Load each directory of the command line and print a line of JSON about it.

    Args:
        judge: loads a directory; gives the names of the tensors that did not arrive.
    """
    for directory in sys.argv[1:]:
        try:
            found: dict[str, Any] = {"error": None, "lost": judge(directory)}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:300], "lost": []}
        print("RESULT", json.dumps({"directory": Path(directory).name, **found}), flush=True)
