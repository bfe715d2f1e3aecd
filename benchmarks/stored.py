"""Where an ONNX node comes from in the model, for the benchmarks that compare a file with the model's own weights."""

from __future__ import annotations

import ast

import onnx


def module_of(node: onnx.NodeProto) -> str:
    """Path of the module that `node` comes from; torch.onnx writes the scopes as a list, the node itself last."""
    scopes = next(prop.value for prop in node.metadata_props if prop.key == "pkg.torch.onnx.name_scopes")
    return str(ast.literal_eval(scopes)[-2])


def parts_of(module: str) -> list[str]:
    """Paths of the linears that were merged into `module`: `a.q+k` is `a.q` and `a.k`."""
    first, *others = module.split("+")
    return [first, *(f"{first.rpartition('.')[0]}.{other}" for other in others)]
