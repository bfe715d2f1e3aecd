"""What must hold of any ONNX model before a parser, an inliner or a search may see it.

Circles, of functions that call one another or of nodes that read one another, have no end for whoever follows them;
TensorRT's parser and onnx's inliner do, and die of it. The rest keeps indices, types and names what readers take them
for. A graph whose nodes are only out of order is let through: TensorRT and ONNX Runtime sort it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any

import onnx

from qcompile.onnxfile.names import shown
from qcompile.onnxfile.nodes import check_node, subgraphs, tensor_problem, type_problem
from qcompile.onnxfile.payload import payload_problem
from qcompile.onnxfile.unsound import Unsound

Key = tuple[str, str, str]
_DEEPEST_GRAPH = 16  # protobuf's C++ reader takes 33
_DEEPEST_CALL = 64
_MOST_NODES = 500_000  # of a graph with the bodies of functions in place of their calls
_MOST_BYTES = 512 << 20


def check_structure(model: onnx.ModelProto) -> None:
    """Raises Unsound, naming the node or the tensor, for a model that no reader should follow.

    *Requires*: its texts are text (`check_text`).
    """
    opsets = _opsets(model.opset_import)
    functions: dict[Key, onnx.FunctionProto] = {}
    for function in model.functions:
        if functions.setdefault(_key(function), function) is not function:
            raise Unsound(f"has two functions {_call(_key(function))}")
    _check_reads(check_graph(model.graph, opsets, functions, 0, ""), "")
    for function in model.functions:
        where = f" in function {_call(_key(function))}"
        names = {name: "an input" for name in function.input}
        free = _check_nodes(function.node, {**opsets, **_opsets(function.opset_import)}, functions, names, 0, where)
        _check_reads(free | {name for name in function.output if name not in names}, where)
    _check_calls(model, functions)


def _check_reads(free: set[str], where: str) -> None:
    if free:
        names = ", ".join(f"'{name}'" for name in sorted(free)[:3])
        raise Unsound(f"has a reader or an output{where} of {names}, which nothing makes")


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in imports}


def _key(proto: onnx.FunctionProto | onnx.NodeProto) -> Key:
    return proto.domain, proto.op_type if isinstance(proto, onnx.NodeProto) else proto.name, proto.overload


def _call(key: Key) -> str:
    return f"{key[0]}::{key[1]}" + (f" ({key[2]})" if key[2] else "")


def check_graph(
    graph: onnx.GraphProto,
    opsets: Mapping[str, int],
    functions: Mapping[Key, onnx.FunctionProto],
    depth: int,
    where: str,
) -> set[str]:
    """The names that `graph` reads from outside. Raises Unsound. `where`: words for the function that it is in."""
    if depth > _DEEPEST_GRAPH:
        raise Unsound(f"has graphs nested more than {_DEEPEST_GRAPH} deep")
    names: dict[str, str] = {}
    for value in graph.input:
        _define(names, value.name, "an input")
    for tensor in graph.initializer:
        if tensor.name in names and names[tensor.name] != "an input":  # of which it is the default
            raise Unsound(f"has two initializers '{tensor.name}'")
        names[tensor.name] = "an initializer"
        _check_tensor(tensor, tensor.name, sizes=depth > 0)  # of those of the main graph, that is a check of its own
    for sparse in graph.sparse_initializer:
        _define(names, sparse.values.name, "a sparse initializer")
        for tensor in (sparse.values, sparse.indices):
            _check_tensor(tensor, sparse.values.name, sizes=True)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if problem := type_problem(value.type):
            raise Unsound(f"has a value '{value.name}' {problem}")
    free = _check_nodes(graph.node, opsets, functions, names, depth, where)
    return free | {value.name for value in graph.output if value.name not in names}


def _check_tensor(tensor: onnx.TensorProto, name: str, *, sizes: bool) -> None:
    if problem := tensor_problem(tensor) or (payload_problem(tensor, None) if sizes else None):
        raise Unsound(f"has an initializer '{name}' that {problem}")


def _define(names: dict[str, str], name: str, what: str) -> None:
    if name in names:
        raise Unsound(f"has two producers of '{name}': {names[name]} and {what}")
    if name:
        names[name] = what


def _check_nodes(
    nodes: Iterable[onnx.NodeProto],
    opsets: Mapping[str, int],
    functions: Mapping[Key, onnx.FunctionProto],
    names: dict[str, str],
    depth: int,
    where: str,
) -> set[str]:
    """Adds to `names` what the nodes make; the names that they read, and nobody here makes."""
    producers: dict[str, int] = {}
    listed = list(nodes)
    for index, node in enumerate(listed):
        called = functions.get(_key(node))
        check_node(node, opsets, calls=called is not None, in_function=bool(where))
        if called and (len(node.input) > len(called.input) or len(node.output) > len(called.output)):
            raise Unsound(f"has {shown(node)}{where}, which has more inputs or outputs than the function that it calls")
        for name in filter(None, node.output):
            _define(names, name, f"{shown(node)}{where}")
            producers[name] = index
    reads = []
    for node in listed:
        inner = (check_graph(graph, opsets, functions, depth + 1, where) for graph in subgraphs(node))
        reads.append(set(node.input).union(*inner) - {""})
    used = [[producers[name] for name in sorted(read) if name in producers] for read in reads]
    if circle := _circle(range(len(listed)), used.__getitem__):
        raise Unsound(f"has a circle of nodes{where}: {' reads '.join(shown(listed[i]) for i in circle)}")
    return set[str]().union(*reads) - names.keys()


def _check_calls(model: onnx.ModelProto, functions: Mapping[Key, onnx.FunctionProto]) -> None:
    called = {key: list(_calls(function.node, functions)) for key, function in functions.items()}
    if circle := _circle(called, called.__getitem__):
        raise Unsound(f"has functions that call one another in a circle: {' calls '.join(map(_call, circle))}")
    depths: dict[Key, int] = {}
    sizes: dict[Key, tuple[int, int]] = {}
    for key in _callees_first(called):
        depths[key] = 1 + max((depths[other] for other in called[key]), default=0)
        sizes[key] = _size(functions[key].node, functions[key].ByteSize(), called[key], sizes)
        if depths[key] > _DEEPEST_CALL:
            raise Unsound(f"has functions that call one another more than {_DEEPEST_CALL} deep: {_call(key)}")
    calls = list(_calls(model.graph.node, functions))
    count, size = _size(model.graph.node, 0, calls, sizes)
    if calls and (count > _MOST_NODES or size > _MOST_BYTES):
        raise Unsound(f"has functions whose bodies are {count:,} nodes of {size:,} bytes in place of their calls")


def _size(nodes: Collection[Any], own: int, calls: list[Key], sizes: Mapping[Key, tuple[int, int]]) -> tuple[int, int]:
    """Nodes and bytes with the bodies in place of the calls."""
    return (
        len(nodes) + sum(sizes[key][0] for key in calls),
        own + sum(sizes[key][1] for key in calls),
    )


def _calls(nodes: Iterable[onnx.NodeProto], functions: Collection[Key]) -> Iterator[Key]:
    for node in nodes:
        if (key := _key(node)) in functions:
            yield key
        for graph in subgraphs(node):
            yield from _calls(graph.node, functions)


def _callees_first(called: Mapping[Key, list[Key]]) -> list[Key]:
    """*Requires*: there is no circle."""
    order: dict[Key, None] = {}
    waiting = [(key, False) for key in called]
    while waiting:
        key, entered = waiting.pop()
        if entered:
            order[key] = None
        elif key not in order:
            waiting.append((key, True))
            waiting += [(other, False) for other in called[key] if other not in order]
    return list(order)


def _circle(items: Iterable[Any], following: Callable[[Any], Iterable[Any]]) -> list[Any] | None:
    """The first circle found, its first item once more at the end; None if there is none."""
    done: set[Hashable] = set()
    for start in items:
        if start in done:
            continue
        path: dict[Any, Iterator[Any]] = {start: iter(following(start))}
        while path:
            current = next(reversed(path))
            successor = next((item for item in path[current] if item not in done), None)
            if successor is None:
                done.add(current)
                del path[current]
            elif successor in path:
                ring = list(path)
                return [*ring[ring.index(successor) :], successor]
            else:
                path[successor] = iter(following(successor))
    return None
