"""Names for people: the module path that the exporter left on an ONNX node, and one phrase that points at a node."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import onnx
import onnx_ir

from qcompile.onnxfile.scopes import NAME_SCOPES, read_scopes

__all__ = ["NAME_SCOPES", "describe", "module_path", "name_nodes", "path_of_scopes"]

# What the exporter writes for an FX node without nn_module_stack.
_NO_STACK = "_empty_nn_module_stack_from_metadata_hook"


def module_path(node: onnx.NodeProto) -> str | None:
    """Path of the PyTorch module that `node` comes from, `""` for the root, None where the exporter wrote none.

    Source: `metadata_props["pkg.torch.onnx.name_scopes"]`, a list literal from the outermost module to the FX node.
    """
    return next((path_of_scopes(entry.value) for entry in node.metadata_props if entry.key == NAME_SCOPES), None)


def path_of_scopes(scopes: str) -> str | None:
    """The module path in the exporter's list of scopes, the last of which is the FX node."""
    paths = _paths(scopes)
    return paths if paths is None else (paths or [""])[-1]


def _paths(scopes: str) -> list[str] | None:
    """The module paths in the exporter's list of scopes, outermost first; None if there is no such list."""
    names = read_scopes(scopes)
    return None if names is None or _NO_STACK in names[:-1] else names[:-1]


def name_nodes(model: onnx_ir.Model) -> None:
    """Call each node as it stands in the model, `/layers.0/q_proj/MatMul`, as torch's first exporter did.

    Viewers group nodes by such names, and TensorRT names kernels, and its errors, by them. A node that the exporter's
    optimizer made is where the first that it reads is.
    """
    taken: Counter[str] = Counter()
    known: dict[onnx_ir.Node | None, list[str]] = {}
    for node in model.graph.all_nodes():
        before = next((known[made] for value in node.inputs if value and (made := value.producer()) in known), [])
        known[node] = _paths(node.metadata_props.get(NAME_SCOPES, "[]")) or before
        parts = [path.removeprefix(f"{outer}.") for outer, path in pairwise(["", *filter(None, known[node])])]
        name = "/".join(["", *parts, node.op_type])
        node.name = f"{name}_{taken[name]}" if taken[name] else name
        taken[name] += 1


def describe(node: onnx.NodeProto) -> str:
    """`QuantizeLinear 'n12' (module 'layers.0.q_proj')`: what every message of the verifier starts with."""
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    name = node.name or (node.output[0] if node.output else "")
    path = module_path(node)
    module = "" if path is None else f" (module '{path}')" if path else " (root module)"
    return f"{operator} '{name}'{module}"
