"""A graph as text, one line a node: short enough to stand in a test, the same in every release of torch."""

from __future__ import annotations

import difflib
import operator
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.graph import module_path
from passes.subgraphs import held, subgraph_calls

__all__ = ["dtype_name", "graph_diff", "graph_text", "operator_text"]

_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}
_SYMBOL = re.compile(r"\b([a-z]{1,2})(\d+)\b")


def graph_text(gm: GraphModule, *, stable: bool = False) -> str:
    """`gm` and the graphs in its calls, inputs and constants first come, first served.

    Args:
        stable: for a test's expected value: calls are named by their operators in order, sizes `s0`, `s1`, and modules
            are left out. Otherwise nodes and sizes are called what messages call them.

    >>> print(graph_text(gm, stable=True))
    x: f32[s0, 4]
    w = constant: f32[4, 6]
    transpose = transpose.int(w, 0, 1): f32[6, 4]
    linear = linear(x, transpose): f32[s0, 6]
    return linear
    """
    text = "\n".join(_lines(gm, _names(gm) if stable else None))
    return _renamed(text) if stable else text


def graph_diff(before: str, after: str, names: tuple[str, str] = ("before", "after")) -> str:
    """What differs between the texts of two graphs, as a unified diff; empty where nothing does."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm="", n=2)
    return "\n".join(lines)


def operator_text(target: Any) -> str:
    """What an operator is called in a text: `linear`, `add.Tensor`, `qcompile.quantize`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removeprefix("aten.").removesuffix(".default")
    return (
        str(target) if isinstance(target, torch._ops.HigherOrderOperator) else getattr(target, "__name__", str(target))
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`f32` of torch.float32; the whole name of those without such a short one."""
    name = str(dtype).removeprefix("torch.")
    found = re.fullmatch(r"([a-z]+?)(\d+\w*)", name)
    return _SHORT[found[1]] + found[2] if found and found[1] in _SHORT else name


def _names(gm: GraphModule) -> dict[Node, str]:
    """Names that follow from what the graph does alone."""
    seen = Counter(node.name for node in gm.graph.find_nodes(op="placeholder"))
    names = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            names[node] = node.name
        else:
            base = str(node.target) if node.op == "get_attr" else operator_text(node.target).rpartition("::")[2]
            base = base if node.op == "get_attr" else re.sub(r"\W", "_", base.split(".")[_at(base)])
            names[node] = base + (f"_{seen[base]}" if seen[base] else "")
            seen[base] += 1
    return names


def _at(operator: str) -> int:
    """Which part of an operator's name says what it does: a namespace of its own comes first."""
    return 1 if operator.count(".") and operator.split(".")[0] in ("qcompile", "prims", "higher_order") else 0


def _lines(gm: GraphModule, names: dict[Node, str] | None) -> Iterator[str]:
    def said(value: Any) -> str:
        if isinstance(value, Node):
            return names[value] if names is not None else value.name
        if isinstance(value, list | tuple):
            inside = ", ".join(map(said, value))
            return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
        if isinstance(value, torch.dtype):
            return dtype_name(value)
        return repr(value) if isinstance(value, str) else str(value)

    for node in gm.graph.nodes:
        is_graph = node.op == "get_attr" and isinstance(getattr(gm, str(node.target), None), GraphModule)
        if is_graph:
            continue  # it follows below
        path = "" if names is not None or node.op != "call_function" else module_path(node)
        yield _line(node, said) + (f"  # {path}" if path else "")
    for call in subgraph_calls(gm.graph):
        for name, part in held(gm, call).items():
            yield f"{name} of {said(call)}:"
            yield from (f"    {line}" for line in _lines(part, None if names is None else _names(part)))


def _line(node: Node, said: Any) -> str:
    if node.op == "output":
        results = node.args[0]
        inside = results if isinstance(results, list | tuple) else (results,)
        return f"return {', '.join(map(said, inside))}"
    value = _value(node.meta["val"]) if "val" in node.meta else "?"
    if node.op == "placeholder":
        return f"{said(node)}: {value}"
    if node.op == "get_attr":
        own = f"constant {node.target}" if said(node) != node.target else "constant"
        return f"{said(node)} = {own}: {value}"
    if node.target is operator.getitem:
        return f"{said(node)} = {said(node.args[0])}[{node.args[1]}]: {value}"
    given = [*map(said, node.args), *(f"{key}={said(value)}" for key, value in node.kwargs.items())]
    return f"{said(node)} = {operator_text(node.target)}({', '.join(given)}): {value}"


def _value(value: Any) -> str:
    """A fake value: type and sizes of a tensor, the expression of a size."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_value, value))})"
    return str(value) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else type(value).__name__


def _renamed(text: str) -> str:
    """`text` with the symbols of sizes counted in order: torch derives their numbers from names of its own."""
    known: dict[str, str] = {}
    kinds: Counter[str] = Counter()

    def new(found: re.Match[str]) -> str:
        if found[1] not in ("s", "u"):
            return found[0]
        if found[0] not in known:
            known[found[0]] = f"{found[1]}{kinds[found[1]]}"
            kinds[found[1]] += 1
        return known[found[0]]

    # types are `f32` and `u8`: only what stands in brackets, or is the whole value of a size, is a symbol
    sizes = re.compile(r"(?<=: )([^:\[(]*[su]\d[^:\[(]*)$|(?<=\w)\[([^\]]*)\](?=[,)]|$)", re.MULTILINE)
    return sizes.sub(lambda m: _SYMBOL.sub(new, m[0]), text)
