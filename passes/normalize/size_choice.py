"""At which sizes a function of sizes is computed, to tell what function it is.

What a mask makes of sizes changes only where a size passes a number that the mask is computed with (a window, the
length of a buffer): each symbol takes values around each of those, besides some small ones of every kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from passes.constants import constant
from passes.graph import aten
from passes.sdpa import HIDDEN

__all__ = ["Sizes", "choose_sizes"]

Sizes = Mapping[sympy.Symbol, int]

_GENERAL = (2, 3, 5, 17, 33, 64)  # small, odd, and a power of two
_PAIRS = (2, 3, 17)
_LARGEST = 1 << 20  # numbers beyond are sentinels (slice ends), and those below HIDDEN hide
_FEW = 16  # a constant tensor of so many elements is taken for numbers to compute with, not for a table
_LARGEST_BOUND = 1024  # the end of a symbol's range is tried up to here

# Operators whose numbers are axes or shapes: no threshold hides there.
_LAYOUT = (
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten._to_copy.default,
    aten.clone.default,
    aten.cumsum.default,
)
# Operators whose numbers are lengths.
_RANGES = (
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.slice.Tensor,
    aten.zeros.default,
    aten.ones.default,
    aten.full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
)


def choose_sizes(gm: GraphModule, nodes: list[Node], env: ShapeEnv | None) -> Iterator[tuple[Sizes, bool]]:
    """Sizes by symbol for what `nodes` compute, and whether these may be left out if they are too large."""
    symbols = sorted({s for n in nodes for e in _expressions(n) for s in e.free_symbols}, key=str)
    if not symbols:
        yield {}, False
        return
    thresholds, lengths = _numbers(gm, nodes)
    choices = {s: _values(s, env, thresholds, lengths) for s in symbols}
    smallest = {s: min(values) for s, values in choices.items()}
    if len(symbols) <= 3:
        few = [[v for v in values if v in _PAIRS] or [min(values)] for values in choices.values()]
        for combination in itertools.product(*few):
            yield dict(zip(symbols, combination, strict=True)), False
    for symbol, values in choices.items():
        for value in sorted(values):
            yield {**smallest, symbol: value}, values[value]


def _values(symbol: sympy.Symbol, env: ShapeEnv | None, thresholds: set[int], lengths: set[int]) -> dict[int, bool]:
    """Sizes to try for `symbol`, within its range, and whether each may be left out.

    Past a static length nothing changes unless an axis is compared with it, so those may.
    """
    bounds = env.var_to_range.get(symbol) if env is not None else None
    low = int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 2
    high = int(bounds.upper) if bounds is not None and bounds.upper.is_Integer else None
    wanted = {w: True for c in lengths for w in _around(c)}
    wanted.update({w: False for c in thresholds for w in (*_around(c), sum(thresholds) + 1)})
    wanted.update(dict.fromkeys((max(low, 1), *_GENERAL), False))
    if high is not None and high <= _LARGEST_BOUND:
        wanted[high] = False
    return {w: free for w, free in wanted.items() if w >= low and (high is None or w <= high)}


def _around(number: int) -> tuple[int, ...]:
    return (number - 1, number, number + 1, 2 * number + 1)


def _expressions(node: Node) -> list[sympy.Expr]:
    """The symbolic sizes of a tensor, or a symbolic number."""
    value = node.meta.get("val")
    numbers = value.shape if isinstance(value, torch.Tensor) else [value]
    return [n.node.expr for n in numbers if isinstance(n, torch.SymInt)]


def _numbers(gm: GraphModule, nodes: list[Node]) -> tuple[set[int], set[int]]:
    """Numbers at which what `nodes` compute may change: those it computes with, and lengths of ranges and constants."""
    thresholds: set[int] = set()
    lengths: set[int] = set()
    for node in nodes:
        thresholds.update(abs(int(n)) for e in _expressions(node) for n in e.atoms(sympy.Integer))
        stored = constant(gm, node)
        if stored is not None:
            lengths.update(stored.shape)
            if stored.numel() <= _FEW and not stored.is_complex():
                thresholds.update(abs(int(n)) for n in stored.flatten().tolist() if HIDDEN < n < _LARGEST)
        elif node.op == "call_function" and node.target not in _LAYOUT:
            found = lengths if node.target in _RANGES else thresholds
            for number in pytree.tree_leaves((node.args, dict(node.kwargs))):
                if isinstance(number, int | float) and not isinstance(number, bool) and HIDDEN < number < _LARGEST:
                    found.add(abs(int(number)))
    return thresholds - {0, 1}, lengths - {0, 1}
