"""Private names of other libraries: where each is, whether it does what it is used for, and what to say if not.

A release of torch may move such a name without a word. Here that is one sentence, not an AttributeError in the middle
of an export, and `problem` finds it before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from passes.errors import CompatError

__all__ = ["Private", "lazily"]


@dataclass(frozen=True)
class Private:
    """A name that its library promises nothing of.

    Attributes:
        place: the module that has it, which is imported when it is asked for.
        name: in that module; with dots, an attribute of a class there.
        purpose: what cannot be done without.
        behaves: whether what is found does what it is used for; it takes no time and changes nothing.
    """

    place: str
    name: str
    purpose: str
    behaves: Callable[[Any], bool] | None = None

    @property
    def library(self) -> str:
        return self.place.partition(".")[0]

    @property
    def is_installed(self) -> bool:
        """Whether its library is there at all; an optional one need not be."""
        return find_spec(self.library) is not None

    def __str__(self) -> str:
        return f"{self.place}.{self.name}"

    def get(self) -> Any:
        """What it names. Raises `CompatError` where it is not there any more."""
        try:
            found: Any = importlib.import_module(self.place)
            for part in self.name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise CompatError(self._said("is not there")) from error
        return found

    def problem(self) -> str | None:
        """Why it cannot be used, as one sentence; None if it can."""
        try:
            found = self.get()
            good = self.behaves is None or self.behaves(found)
        except CompatError as error:
            return str(error)
        except Exception as error:  # whatever another release makes of the call
            return self._said(f"fails with {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return None if good else self._said("is there and behaves in another way")

    def _said(self, what: str) -> str:
        return (
            f"{self.library} {_version(self.library)}: {self} {what}, without which {self.purpose} does not work."
            " constraints.txt has the versions that are tested, and `qcompile doctor` compares them with yours"
        )


def _version(library: str) -> str:
    for distribution in metadata.packages_distributions().get(library, [library]):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "(not installed)"


def lazily(module: str, privates: Mapping[str, Private]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of `module`: the names load when they are first asked for (PEP 562).

    Args:
        privates: what `module` calls it -> what it is.
    """

    def get(name: str) -> Any:
        if name not in privates:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        found = privates[name].get()
        setattr(sys.modules[module], name, found)
        return found

    return get, lambda: sorted({*vars(sys.modules[module]), *privates})
