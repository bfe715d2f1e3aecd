"""No Cast between a DQ and a GEMM: older writers compute the quantizers in another type than the model.

    before:  codes -> DQ (float32 scale) -> Cast (float16) -> Transpose -> MatMul
    after:   codes -> DQ (float16 scale)                   -> Transpose -> MatMul

    before:  DQ (float16) -> Cast (float32) -> MatMul -> Cast (float16)
    after:   DQ (float16)                   -> MatMul

The second form is that of FP8 attention in older files; with products added up in float32, as all of TensorRT's FP8
kernels and ONNX Runtime do, both give the same numbers. In the first, a narrower scale is rounded once (2^-11 relative
in float16, which is what the Cast did to the product), a wider one is exact.

*Raises*: RepairError for a scale that the narrower type cannot hold: as 0, denormal or infinite.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.errors import RepairError
from qcompile.onnx.repair.integers import integer_nodes
from qcompile.onnx.repair.legacy import DEQUANTIZE, MOVES, describe, is_blocked, is_standard
from qcompile.onnx.repair.state import State

_GEMMS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
Path = list[ir.Node]  # from the DQ to the operand
Made = dict[tuple[ir.Node, ir.DataType], ir.Value]  # the copy of a node in a type


def remove_casts(state: State) -> None:
    """*Requires*: DQ are standard, those of FP8 have constant scales, and types are inferred."""
    integers = (
        n for n in integer_nodes(state, DEQUANTIZE) if not is_blocked(n) and state.constant(n.inputs[1]) is not None
    )
    quantizers = {*state.fp8_nodes(DEQUANTIZE), *integers}
    made: Made = {}
    for gemm in state.nodes():
        if not is_standard(gemm, *_GEMMS):
            continue
        paths = {index: path for index in (0, 1) if (path := _path(gemm.inputs[index], quantizers))}
        paths = {index: path for index, path in paths.items() if _casts(path)}
        if not paths:
            continue
        state.changes.casts += sum(len(_casts(path)) for path in paths.values())
        narrow = _computed_in(gemm, paths)
        for index, path in paths.items():
            wanted = narrow or ir.DataType(_casts(path)[-1].attributes["to"].as_int())
            gemm.replace_input_with(index, _rebuilt(state, path, wanted, made))
        if narrow is not None:
            _narrow_output(state, gemm, narrow)


def _path(value: ir.Value | None, quantizers: set[ir.Node]) -> Path:
    """The nodes from a DQ to `value`, if only Casts and moves lie between."""
    path: Path = []
    node = value.producer() if value is not None else None
    while is_standard(node, *MOVES, "Cast"):
        assert node is not None and node.inputs[0] is not None
        path.insert(0, node)
        node = node.inputs[0].producer()
    return [node, *path] if node is not None and node in quantizers else []


def _casts(path: Path) -> list[ir.Node]:
    return [node for node in path if node.op_type == "Cast"]


def _computed_in(gemm: ir.Node, paths: dict[int, Path]) -> ir.DataType | None:
    """The half type that both operands are cast up from and the product back down to, if that is the form."""
    sources = {_scale_type(path[0]) for path in paths.values()}
    users = list(gemm.outputs[0].consumers())
    if gemm.op_type != "MatMul" or len(paths) != 2 or len(sources) != 1 or not users:
        return None
    (source,) = sources
    back = all(is_standard(user, "Cast") and user.attributes["to"].as_int() == source for user in users)
    return source if source in _NARROW and back and not gemm.outputs[0].is_graph_output() else None


def _scale_type(node: ir.Node) -> ir.DataType | None:
    scale = node.inputs[1]
    return scale.dtype if scale is not None else None


def _rebuilt(state: State, path: Path, dtype: ir.DataType, made: Made) -> ir.Value:
    """The operand in `dtype` without Casts: copies of the DQ and of the moves, as others may read the old ones."""
    value: ir.Value | None = None
    for node in path:
        if node.op_type == "Cast":
            continue
        key = (node, dtype)
        if key not in made:
            made[key] = _copied(state, node, dtype) if value is None else _moved(state, node, value)
        value = made[key]
    assert value is not None
    return value


def _copied(state: State, node: ir.Node, dtype: ir.DataType) -> ir.Value:
    scale = narrow_scale(state, node, dtype)
    copy = _copy(state, node, [node.inputs[0], scale, *node.inputs[2:]])
    state.converted.add(copy.producer())  # type: ignore[arg-type]
    return copy


def narrow_scale(state: State, node: ir.Node, dtype: ir.DataType) -> ir.Value:
    """The scale of a DQ in `dtype`. Raises RepairError where that cannot hold it."""
    scale = state.constant(node.inputs[1])
    if scale is None:
        raise RepairError(f"{describe(node)}: a Cast to {dtype.name} follows it, and its scale is computed at run time")
    rounded = scale.astype(dtype.numpy())
    least = 2.0**-14 if dtype is ir.DataType.FLOAT16 else 2.0**-126  # the smallest normal number
    exact = scale.astype(np.float32)
    if not (np.isfinite(rounded.astype(np.float32)).all() and (exact >= least).all()):
        raise RepairError(
            f"{describe(node)}: a Cast to {dtype.name} lies between it and a GEMM, and its scale "
            f"({float(exact.min()):.3g}) is too small or too large for that type; compute that layer in float32"
        )
    assert node.inputs[1] is not None
    return state.initializer(f"{node.inputs[1].name}_{dtype.name.lower()}", rounded)


def _moved(state: State, node: ir.Node, value: ir.Value) -> ir.Value:
    return _copy(state, node, [value, *node.inputs[1:]])


def _copy(state: State, node: ir.Node, inputs: list[ir.Value | None]) -> ir.Value:
    copy = ir.node(node.op_type, inputs, dict(node.attributes), metadata_props=dict(node.metadata_props))
    copy.name = copy.outputs[0].name = state.name(f"{node.outputs[0].name}_nocast")
    assert node.graph is not None
    node.graph.insert_after(node, copy)
    return copy.outputs[0]


def _narrow_output(state: State, gemm: ir.Node, dtype: ir.DataType) -> None:
    output = gemm.outputs[0]
    output.type = ir.TensorType(dtype)
    for cast in list(output.consumers()):
        if cast.outputs[0].is_graph_output():
            continue  # a Cast to the type that it has: harmless, and it gives the output its name
        cast.outputs[0].replace_all_uses_with(output)
        state.changes.casts += 1
