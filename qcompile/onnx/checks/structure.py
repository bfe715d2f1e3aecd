"""Is the file well formed, readable by standard tools, and typed: payloads, checker, opaque operators, shapes."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx import checker, external_data_helper, shape_inference

from qcompile.onnx.checks.base import Findings
from qcompile.onnx.inlining import function_key
from qcompile.onnx.loading import is_external, payload_bytes
from qcompile.onnx.names import describe
from qcompile.onnx.view import STANDARD_DOMAINS, ModelView, infer, walk


def payloads(view: ModelView) -> Findings:
    """Each initializer has exactly the bytes that its dims and type ask for, in the file or beside it.

    It is what the checker would say of the weights, which it does not get to see.
    """
    tensors = view.model.graph.initializer
    problems = [problem for tensor in tensors if (problem := _payload_problem(tensor, view.base_dir))]
    locations = {external_data_helper.ExternalDataInfo(tensor).location for tensor in tensors if is_external(tensor)}
    beside = ", ".join(sorted(locations - {view.file_name}))
    return Findings(problems, f"{len(tensors)} initializers" + (f", large ones in {beside}" if beside else ""))


def well_formed(view: ModelView) -> Findings:
    """`onnx.checker` accepts the skeleton, function bodies included."""
    try:
        checker.check_model(view.skeleton)
    except checker.ValidationError as error:
        return Findings([f"onnx.checker: {_located(view, error)}"], "")
    return Findings([], f"{len(view.model.graph.node)} nodes, {len(view.model.functions)} functions")


def _located(view: ModelView, error: Exception) -> str:
    """The message of onnx in one line, with the module path of the node that it names."""
    message = " ".join(str(error).split())
    names = set(re.findall(r"[Nn]ame: ([^\s,)]+)", message))
    nodes = [describe(node) for node in walk(view.model.graph) if node.name in names]
    return f"{', '.join(nodes)}: {message}" if nodes else message


def _payload_problem(tensor: onnx.TensorProto, base_dir: Path | None) -> str | None:
    expected = payload_bytes(tensor)
    if not is_external(tensor):
        found = len(tensor.raw_data)
        if tensor.HasField("raw_data") and found != expected:
            return f"initializer '{tensor.name}' has {found} bytes, its dims and type ask for {expected}"
        return None
    if base_dir is None:
        return f"initializer '{tensor.name}' is external data: verify the file by its path"
    info = external_data_helper.ExternalDataInfo(tensor)
    path = base_dir / info.location
    if Path(info.location).is_absolute() or ".." in Path(info.location).parts:
        return f"initializer '{tensor.name}' points outside the model's directory: '{info.location}'"
    if not path.is_file():
        return f"initializer '{tensor.name}' points at '{info.location}', which is not beside the model"
    offset, length = info.offset or 0, info.length
    available = path.stat().st_size - offset
    if (available if length is None else length) != expected or available < expected:
        stated = available if length is None else min(length, available)
        return f"initializer '{tensor.name}' has {stated} bytes in '{info.location}', not the {expected} of its type"
    return None


def nothing_opaque(view: ModelView) -> Findings:
    """Every node is a standard operator, or a call of a model-local function whose body is.

    An operator of a vendor's domain without a body can be read by one tool only; nothing could be verified past it.
    """
    functions = {function_key(function) for function in view.model.functions}
    places = [("", walk(view.model.graph))]
    places += [(f" in function {f.domain}::{f.name}", iter(f.node)) for f in view.model.functions]
    problems = [
        f"{describe(node)}{place} is neither a standard operator nor a function of this file"
        for place, nodes in places
        for node in nodes
        if node.domain not in STANDARD_DOMAINS and function_key(node) not in functions
    ]
    if not problems:
        # A body written for another opset stays a call, and then none of the checks below have seen inside it.
        left = (node for node in view.nodes if node.domain not in STANDARD_DOMAINS)
        problems = [f"{describe(node)}: its function cannot be inlined; give it the model's opset" for node in left]
    names = sorted({f"{f.domain}::{f.name}" for f in view.model.functions})
    return Findings(problems, f"model-local functions: {', '.join(names) or 'none'}")


def shapes(view: ModelView) -> Findings:
    """Strict inference agrees with the types in the file; without them it still types every Q/DQ output.

    "Without them": a converter that trusts stale value_info hides an operator whose output nobody can infer.
    Functions are tried both as calls, which is what readers see, and inlined, for the Q/DQ in their bodies.
    """
    try:
        checker.check_model(view.skeleton, full_check=True)
        types = infer(view.flat)
        as_calls = infer(view.skeleton) if view.model.functions else types
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        return Findings([f"strict shape inference: {_located(view, error)}"], "")
    nodes = view.of_type("QuantizeLinear", "DequantizeLinear")
    outer = {output for node in walk(view.skeleton.graph) for output in node.output}
    problems = []
    for node in nodes:
        name = node.output[0]
        known = [table[name] for table in (types, as_calls) if name in table]
        if len(known) < (2 if name in outer else 1) or not all(t.elem_type and t.HasField("shape") for t in known):
            problems.append(f"{describe(node)}: no shape and type for '{name}' once value_info is cleared")
    return Findings(problems, f"{len(nodes)} Q/DQ outputs have a type and a shape with value_info cleared")
