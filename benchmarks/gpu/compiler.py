"""torch.compile with the same settings for everyone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class Unavailable(Exception):
    """This variant does not exist here; the message says what is missing."""


@dataclass(frozen=True)
class Compiler:
    """How everything that is compiled is compiled.

    Attributes:
        inductor: generate kernels; without, graphs run operator by operator, which only shows that everything fits.
        autotune: let Inductor time its choices (max-autotune without CUDA graphs, which are recorded here).
    """

    inductor: bool = True
    autotune: bool = False

    def options(self) -> dict[str, Any]:
        return {"mode": "max-autotune-no-cudagraphs"} if self.autotune else {}

    def plain(self, model: nn.Module) -> Callable[..., Any]:
        if not self.inductor:
            return torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        return torch.compile(model, fullgraph=True, dynamic=False, **self.options())

    def quantized(self, model: nn.Module, **options: Any) -> Callable[..., Any]:
        if not self.inductor:
            options["target"] = "eager"
        options |= self.options()
        return torch.compile(model, backend=_backend(), fullgraph=True, dynamic=False, options=options)


def _backend() -> Any:
    """The backend's name where qcompile is installed, itself where it is only on the path."""
    if "qcompile" in torch._dynamo.list_backends(exclude_tags=()):
        return "qcompile"
    from qcompile.dynamo.backend import qcompile_backend as backend

    return backend
