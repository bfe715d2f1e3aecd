"""Is the file well formed, readable by standard tools, and typed: payloads, checker, opaque operators, shapes."""

from __future__ import annotations

import re

from onnx import checker

from qcompile.onnx.checks.base import Findings
from qcompile.onnx.inlining import function_key
from qcompile.onnx.library import LIBRARY_ERRORS
from qcompile.onnx.names import describe
from qcompile.onnx.view import STANDARD_DOMAINS, ModelView, infer, walk
from qcompile.onnxfile.names import said
from qcompile.onnxfile.payload import is_external, span
from qcompile.onnxfile.read import payload_problems


def payloads(view: ModelView) -> Findings:
    """Each initializer has exactly the bytes that its dims and type ask for, in the file or beside it.

    It is what the checker would say of the weights, which it does not get to see.
    """
    tensors = view.model.graph.initializer
    problems = payload_problems(view.model, view.path)
    own = "" if view.path is None else view.path.name
    locations = set() if problems else {span(tensor).location for tensor in tensors if is_external(tensor)}
    beside = ", ".join(sorted(locations - {own}))
    return Findings(problems, f"{len(tensors)} initializers" + (f", large ones in {beside}" if beside else ""))


def well_formed(view: ModelView) -> Findings:
    """`onnx.checker` accepts the skeleton, function bodies included."""
    try:
        checker.check_model(view.skeleton)
    except LIBRARY_ERRORS as error:
        return Findings([f"onnx.checker: {_located(view, error)}"], "")
    return Findings([], f"{len(view.model.graph.node)} nodes, {len(view.model.functions)} functions")


def _located(view: ModelView, error: Exception) -> str:
    """The message of onnx in one line, with the module path of the node that it names."""
    message = said(error)
    names = set(re.findall(r"[Nn]ame: ([^\s,)]+)", message))
    nodes = [describe(node) for node in walk(view.model.graph) if node.name in names]
    return f"{', '.join(nodes)}: {message}" if nodes else message


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
    except LIBRARY_ERRORS as error:
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
