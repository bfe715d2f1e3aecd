"""Target `inductor`: the graph with weights as inputs, compiled by Inductor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.fx import Graph, GraphModule

import passes
from passes import ir
from passes.compat import FakeTensorMode
from qcompile.compat.dynamo import (
    CustomGraphPass,
    compile_fx,
    decomposition_tables,
    get_hash_for_files,
    inductor_modes,
    numbers_stay,
)
from qcompile.compat.torch import TracingContext, tracing
from qcompile.dynamo.options import Options

_REFERENCES: dict[Any, Callable[..., Any]] = {
    ir.QUANTIZE: ir.quantize,
    ir.DEQUANTIZE: ir.dequantize,
    ir.DYNAMIC_QUANTIZE: ir.dynamic_quantize,
    ir.ATTENTION: ir.attention,
    ir.BATCHED_LINEAR: ir.batched_linear,
}


def compile_inductor(
    gm: GraphModule, fakes: Sequence[Any], fake_mode: FakeTensorMode, options: Options
) -> Callable[..., Any]:
    """`gm` as a function of its placeholders.

    Args:
        gm: without `get_attr`; weights, codes and scales are marked as inputs that do not move (inputs.py).
        fakes: a fake tensor or a symbolic size for each placeholder.
        fake_mode: what those live in.
    """
    settings = {_SLOT: _Fingerprint(), **_mode_settings(options.mode), **options.inductor}
    with tracing(TracingContext(fake_mode)), _references_known(), numbers_stay():
        # A Python float that the model is called with is a constant of our graph. AOTAutograd would ask Dynamo for
        # another trace, which would specialize it and, when it has compiled for eight values, run the float model; at
        # the call of a compiled graph, where we compile for another value, nobody would catch what asks for it.
        compiled: Any = compile_fx(gm, list(fakes), config_patches=settings)
    return compiled  # type: ignore[no-any-return]


@contextmanager
def _references_known() -> Iterator[None]:
    """Let Inductor write our operators as their references. A table handed to `compile_fx` would be part of the key of
    its cache on disk, and has none: nothing would be cached."""
    tables = decomposition_tables()
    for table in tables:
        table.update(_REFERENCES)
    try:
        yield
    finally:
        for table in tables:
            for operator in _REFERENCES:
                table.pop(operator, None)


def _mode_settings(mode: str | None) -> dict[str, Any]:
    return dict(inductor_modes(mode)) if mode not in (None, "default") else {}


_SLOT = "post_grad_custom_pre_pass"


class _Fingerprint(CustomGraphPass):
    """Does nothing; Inductor's caches take its `uuid` into their keys.

    The decompositions of our operators are no part of the graph that the key is made of otherwise.
    """

    def __call__(self, graph: Graph) -> None:
        pass

    def uuid(self) -> bytes:
        return fingerprint()


@functools.cache
def fingerprint() -> bytes:
    """A hash of all passes, their order and the reference of each operator: of the files that hold them."""
    root = Path(passes.__file__).parent
    return get_hash_for_files(tuple(sorted(map(str, root.rglob("*.py")))))
