"""Names for people: the module path that the exporter left on an ONNX node, and one phrase that points at a node."""

from __future__ import annotations

import ast

import onnx

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
# What the exporter writes for an FX node without nn_module_stack.
_NO_STACK = "_empty_nn_module_stack_from_metadata_hook"


def module_path(node: onnx.NodeProto) -> str | None:
    """Path of the PyTorch module that `node` comes from, `""` for the root, None where the exporter wrote none.

    Source: `metadata_props["pkg.torch.onnx.name_scopes"]`, a list literal from the outermost module to the FX node.
    """
    return next((path_of_scopes(entry.value) for entry in node.metadata_props if entry.key == NAME_SCOPES), None)


def path_of_scopes(scopes: str) -> str | None:
    """The module path in the exporter's list of scopes, the last of which is the FX node."""
    try:
        names = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return None
    path = str(names[-2]) if isinstance(names, list) and len(names) > 1 else ""
    return None if path == _NO_STACK else path


def describe(node: onnx.NodeProto) -> str:
    """`QuantizeLinear 'n12' (module 'layers.0.q_proj')`: what every message of the verifier starts with."""
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    name = node.name or (node.output[0] if node.output else "")
    path = module_path(node)
    module = "module unknown" if path is None else f"module '{path}'" if path else "root module"
    return f"{operator} '{name}' ({module})"
