"""Replace calls of model-local functions by their bodies, each body node keeping the module path of its call."""

from __future__ import annotations

import onnx
from onnx import inliner

from qcompile.errors import VerificationError
from qcompile.onnx.library import LIBRARY_ERRORS
from qcompile.onnx.names import NAME_SCOPES
from qcompile.onnxfile.names import said

FunctionKey = tuple[str, str, str]


def function_key(proto: onnx.FunctionProto | onnx.NodeProto) -> FunctionKey:
    """What an ONNX call is resolved by: domain, name, overload."""
    name = proto.name if isinstance(proto, onnx.FunctionProto) else proto.op_type
    return proto.domain, name, proto.overload


def inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` (a skeleton; it is left as it is) with standard operators only, where its functions allow it.

    onnx's inliner drops where a node came from, so that each call first gets a function of its own whose body carries
    the call's metadata. A function with another opset than the model's is not inlined: its calls stay in the graph.

    Raises: VerificationError if onnx's inliner does not take them.
    """
    if not model.functions:
        return model
    functions = {function_key(function): function for function in model.functions}
    tagged = onnx.ModelProto()
    tagged.CopyFrom(model)
    for count, node in enumerate(tagged.graph.node):
        body = functions.get(function_key(node))
        if body is None:
            continue
        own = tagged.functions.add()
        own.CopyFrom(body)
        own.name = f"{body.name}__call{count}"
        node.op_type = own.name
        scopes = [entry for entry in node.metadata_props if entry.key == NAME_SCOPES]
        for inner in own.node:
            del inner.metadata_props[:]
            inner.metadata_props.extend(scopes)
    try:
        return inliner.inline_local_functions(tagged)
    except LIBRARY_ERRORS as error:
        raise VerificationError(f"functions cannot be put in place of their calls: {said(error)}") from error
