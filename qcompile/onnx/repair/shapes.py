"""Types and shapes of intermediate tensors: what the file says is thrown away, and inferred again."""

from __future__ import annotations

import onnx_ir as ir
from onnx import shape_inference

from qcompile.errors import RepairError
from qcompile.onnx.library import LIBRARY_ERRORS
from qcompile.onnx.loading import without_weights
from qcompile.onnx.repair.legacy import is_opaque
from qcompile.onnx.repair.state import State
from qcompile.onnxfile.names import said


def forget(state: State) -> None:
    """Drop the types of intermediates, but for outputs of operators that nobody can infer: they are all there is."""
    outputs = {value for graph in state.model.graphs() for value in graph.outputs}
    for node in state.nodes():
        if not is_opaque(node, state.model):
            for value in node.outputs:
                if value not in outputs:
                    value.type, value.shape = None, None


def infer(state: State, *, strict: bool) -> None:
    """Types and shapes of every tensor, from the inputs on, written to the model.

    Raises: RepairError if operators, or what the graph says of its outputs, contradict each other; if not strict, of
    what onnx cannot read at all.
    """
    with without_weights(state.model) as proto:
        try:
            inferred = shape_inference.infer_shapes(proto, check_type=strict, strict_mode=strict, data_prop=True)
        except LIBRARY_ERRORS as error:
            raise RepairError(
                f"the file contradicts itself{' once its quantizers are standard' * strict}: {said(error)}"
            ) from error
    for ours, theirs in zip(state.model.graphs(), ir.serde.deserialize_model(inferred).graphs(), strict=True):
        found = ir.convenience.create_value_mapping(theirs)
        for name, value in ir.convenience.create_value_mapping(ours).items():
            known = found.get(name)
            if known is not None and value.const_value is None:
                value.type = known.type if known.type is not None else value.type
                value.shape = known.shape if known.shape is not None else value.shape
