"""Is the opset (and the IR version) high enough for each type and attribute used?"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto

from qcompile.onnx.checks.base import Findings
from qcompile.onnx.names import describe
from qcompile.onnx.view import STANDARD_DOMAINS, ModelView, attribute, walk

# Element type -> first opset whose QuantizeLinear takes it, first IR version that defines it (onnx.proto, Changelog).
TYPE_NEEDS: dict[int, tuple[int, int]] = {
    TensorProto.FLOAT8E4M3FN: (19, 9),
    TensorProto.FLOAT8E4M3FNUZ: (19, 9),
    TensorProto.FLOAT8E5M2: (19, 9),
    TensorProto.FLOAT8E5M2FNUZ: (19, 9),
    TensorProto.INT16: (21, 10),
    TensorProto.UINT16: (21, 10),
    TensorProto.INT4: (21, 10),
    TensorProto.UINT4: (21, 10),
    TensorProto.FLOAT4E2M1: (23, 11),
    TensorProto.FLOAT8E8M0: (24, 12),
}
ATTRIBUTE_NEEDS: dict[tuple[str, str], int] = {
    ("QuantizeLinear", "output_dtype"): 21,
    ("QuantizeLinear", "block_size"): 21,
    ("QuantizeLinear", "precision"): 23,
    ("DequantizeLinear", "block_size"): 21,
    ("DequantizeLinear", "output_dtype"): 23,
}


def opset_version(imports: onnx.ModelProto | onnx.FunctionProto) -> int:
    """The standard opset that a model or a function asks for, 0 for none."""
    return max((o.version for o in imports.opset_import if o.domain in STANDARD_DOMAINS), default=0)


def _uses(view: ModelView) -> Iterator[tuple[int, str]]:
    """(element type, who uses it), from initializers, Q zero points, `to` and `output_dtype`: all that makes a type."""
    for name, tensor in view.initializers.items():
        yield tensor.data_type, f"initializer '{name}'"
    for node in [*walk(view.model.graph), *(node for function in view.model.functions for node in function.node)]:
        made = [attribute(node, "to"), attribute(node, "output_dtype")]
        value = attribute(node, "value") if node.op_type == "Constant" else None
        made.append(value.data_type if value is not None else None)
        yield from ((elem_type, describe(node)) for elem_type in made if elem_type)


def opsets(view: ModelView) -> Findings:
    """TensorRT takes FP8 at opset 18 without a word, ONNX Runtime and the checker do not: the file has to be right."""
    opset, ir_version = opset_version(view.model), view.model.ir_version
    problems = []
    reported = set()
    for elem_type, user in _uses(view):
        need_opset, need_ir = TYPE_NEEDS.get(elem_type, (0, 0))
        if elem_type in reported or (opset >= need_opset and ir_version >= need_ir):
            continue
        reported.add(elem_type)  # one message a type, not one a weight
        name = TensorProto.DataType.Name(elem_type)
        problems.append(
            f"{user} uses {name}, which needs opset {need_opset} and IR version {need_ir}; "
            f"the file has opset {opset}, IR version {ir_version}"
        )
    for (op_type, name), need in ATTRIBUTE_NEEDS.items():
        users = (
            [n for n in walk(view.model.graph) if n.op_type == op_type and attribute(n, name)] if opset < need else []
        )
        problems.extend(
            f"{describe(node)}: attribute '{name}' needs opset {need}, the file has {opset}" for node in users
        )
    for function in view.model.functions:
        if opset_version(function) not in (0, opset):
            own = opset_version(function)
            problems.append(f"function {function.domain}::{function.name} has opset {own}, the model {opset}")
    return Findings(problems, f"opset {opset}, IR version {ir_version}")
