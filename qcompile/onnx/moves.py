"""What an optimizer may swap with a Q, or remove: what stands above it is as good as in front of the Q."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qcompile.onnx.view import STANDARD_DOMAINS

FP8 = {ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ}
MOVES = {
    *("Identity", "Dropout", "Cast", "CastLike", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
    *("Expand", "Slice", "Split", "Gather", "Tile", "Pad", "Concat", "MaxPool", "DepthToSpace", "SpaceToDepth"),
}


def is_operator(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of the standard operators `op_types`."""
    return node is not None and node.op_type in op_types and node.domain in STANDARD_DOMAINS


def quantizers(model: ir.Model) -> Iterator[ir.Node]:
    """The QuantizeLinear of the graph and its subgraphs."""
    for node in model.graph.all_nodes():
        if is_operator(node, "QuantizeLinear"):
            yield node


def sources(quantize: ir.Node, through: set[str] | frozenset[str] = frozenset()) -> Iterator[ir.Node]:
    """The nodes that the data of `quantize` comes from, through `MOVES` and the operators of `through`.

    Those of `through` are among them.
    """
    pending, seen = [quantize.inputs[0]], set[ir.Node]()
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_operator(node, *MOVES):
            pending.extend(node.inputs)
            continue
        if is_operator(node, *through):
            pending.extend(node.inputs)
        yield node
