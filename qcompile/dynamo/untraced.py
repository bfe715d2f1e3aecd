"""What Dynamo captures and nothing here can write as plain operators: the error says what it is, and where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.fx import GraphModule, Node

from passes.graph import module_path
from passes.subgraphs import operator_name, subgraph_calls
from qcompile.errors import CompileError
from qcompile.messages import some

# the call that a transformation of torch.func begins with in a graph of Dynamo
_BEGINS = {
    "_vmap_increment_nesting": "torch.vmap",
    "_grad_increment_nesting": "torch.func.grad",
    "_jvp_increment_nesting": "torch.func.jvp",
}


@contextlib.contextmanager
def named(gm: GraphModule) -> Iterator[None]:
    """Raises CompileError for what goes wrong in the body, if `gm` holds what is known to: transformations of
    functions, and operators that hold graphs or have effects."""
    try:
        yield
    except Exception as error:  # torch raises whatever its dispatcher meets
        nodes = [(n, _BEGINS.get(getattr(n.target, "__name__", ""))) for n in gm.graph.nodes]
        nodes += [(call, operator_name(call)) for call in subgraph_calls(gm.graph)]
        found = list(dict.fromkeys(f"{name}{_place(node)}" for node, name in nodes if name is not None))
        if not found:
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CompileError(
            f"{some(found)}: the graph of Dynamo cannot be written as plain"
            f" operators ({first}); qcompile.quantize captures more of them: compile the module of its program, or keep"
            " this part out of the graph with torch.compiler.disable"
        ) from error


def _place(node: Node) -> str:
    path = module_path(node)
    return f" in {path}" if path else ""
