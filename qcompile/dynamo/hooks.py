"""Where this back end hooks into torch, for itself only."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from qcompile.compat.dynamo import backend_inside, backend_of_module, eval_frame
from qcompile.dynamo import generating
from qcompile.dynamo.calls import Region


def install(backend: Any) -> None:
    """Have Dynamo enter a `Region` at each call of what `backend` compiles; `generate` makes such calls, too.

    A back end says so by its attribute `backend_ctx_ctor`, which is lost where `torch.compile` wraps it (2.11 to 2.13);
    here it is put back if the back end is this one.
    """
    original: Any = eval_frame.get_compiler_fn
    if hasattr(original, "_qcompile"):
        return

    def is_ours(inner: Any) -> bool:
        return getattr(inner, "compiler_fn", inner) is backend

    def is_ours_inside(compiled: nn.Module) -> bool:
        return is_ours(backend_of_module(compiled))

    @functools.wraps(original)
    def get_compiler_fn(compiler_fn: Any) -> Any:
        wrapped = original(compiler_fn)
        inner = backend_inside(wrapped)
        if is_ours(inner):
            given = getattr(inner, "kwargs", {})
            wrapped.backend_ctx_ctor = Region(given.get("options"), given.get("mode"))
        return wrapped

    get_compiler_fn._qcompile = True  # type: ignore[attr-defined]
    eval_frame.get_compiler_fn = get_compiler_fn
    generating.install(is_ours_inside)
