"""What the steps of a repair share: the model, its constants, new initializers, and the record of what was changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from qcompile.errors import RepairError
from qcompile.onnx.evaluate import Array, Computation, can_compute
from qcompile.onnx.repair.legacy import DEQUANTIZE, FP8, QUANTIZE, is_blocked, is_standard, zero_point_of
from qcompile.onnx.view import STANDARD_DOMAINS


@dataclass
class Changes:
    """What was done; see `RepairReport` for the meaning of each."""

    standardized: Counter[str] = field(default_factory=Counter)
    folded: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    pools: int = 0
    signed: int = 0
    offsets: list[str] = field(default_factory=list)
    zero_points: list[str] = field(default_factory=list)
    types: int = 0
    casts: int = 0
    transposes: int = 0
    relus: int = 0

    def __bool__(self) -> bool:
        return any(getattr(self, entry.name) for entry in fields(self))


class State:
    """A model under repair."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.changes = Changes()
        self.converted: set[ir.Node] = set()  # were legacy quantizers, or read a folded weight
        self._taken = {name for graph in model.graphs() for name in ir.convenience.create_value_mapping(graph)}
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def nodes(self) -> list[ir.Node]:
        """The nodes of the graph and of its subgraphs, in order."""
        return list(self.model.graph.all_nodes())

    def fp8_nodes(self, *op_types: str) -> Iterator[ir.Node]:
        """Standard FP8 Q and DQ (or one of the two) with one scale, or one for each channel."""
        for node in self.nodes():
            if is_standard(node, *(op_types or (QUANTIZE, DEQUANTIZE))) and not is_blocked(node):
                codes = node.outputs[0] if node.op_type == QUANTIZE else node.inputs[0]
                zero = zero_point_of(node)
                if FP8 in (zero.dtype if zero is not None else None, codes.dtype if codes is not None else None):
                    yield node

    def name(self, wish: str) -> str:
        """`wish`, or that with a number behind it if it is taken."""
        name, count = wish, 1
        while name in self._taken:
            name, count = f"{wish}_{count}", count + 1
        self._taken.add(name)
        return name

    def initializer(self, wish: str, array: Array) -> ir.Value:
        """A small constant, one for all that ask for the same value."""
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self._made:
            name = self.name(wish)
            self._made[key] = self.weight(ir.tensor(array, name=name), name)
        return self._made[key]

    def weight(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """An initializer of the main graph, which subgraphs see too."""
        shape = ir.Shape(list(tensor.shape.numpy()))
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def lazy_weight(
        self, wish: str, shape: tuple[int, ...], codes: Callable[[], Array], dtype: ir.DataType = FP8
    ) -> ir.Value:
        """Codes that are computed when they are written, so that one weight at a time is in memory."""
        name = self.name(wish)
        return self.weight(ir.LazyTensor(lambda: ir.tensor(codes()), dtype, ir.Shape(shape), name=name), name)

    def zero_point(self, shape: tuple[int, ...]) -> ir.Value:
        """FP8 zeros of a scale's shape."""
        return self.initializer("fp8_zero_point", np.zeros(shape, ml_dtypes.float8_e4m3fn))

    def constant(self, value: ir.Value | None) -> Array | None:
        """The value of a tensor that no input can change, computed where it is not stored.

        Raises: RepairError for one that cannot be computed, or is out of proportion to what the file stores.
        """
        return self.evaluator(value)() if value is not None and self.is_constant(value) else None

    def evaluator(self, value: ir.Value) -> Callable[[], Array]:
        """What computes constant `value`; it outlives the nodes that it was read off. It raises as `constant` does."""
        stored: dict[str, Callable[[], Array]] = {}
        nodes: list[onnx.NodeProto] = []
        for known in _callees_first(value):
            if known.const_value is not None:
                stored[str(known.name)] = partial(_stored, known.const_value)
                continue
            node = known.producer()
            assert node is not None
            if node.op_type in ("Constant", "Shape"):
                made = _constant_node(node) if node.op_type == "Constant" else _shape_node(node)
                stored[str(known.name)] = partial(np.asarray, made)
            else:
                nodes.append(ir.serde.serialize_node(node))
        opset = self.model.opset_imports.get("", 21)
        return partial(Computation(str(value.name), stored, nodes, opset), RepairError)

    def is_constant(self, value: ir.Value) -> bool:
        """Whether no input can change `value`: stored, or computed from what is by operators of a known cost."""
        return all(known.const_value is not None or _is_computed(known.producer()) for known in _callees_first(value))


def _callees_first(value: ir.Value) -> Iterator[ir.Value]:
    """What `value` is computed from, and itself at the end; one value of each node."""
    seen: set[ir.Value | ir.Node] = set()
    waiting = [(value, False)]
    while waiting:
        current, entered = waiting.pop()
        node = None if current.const_value is not None else current.producer()
        if entered:
            yield current
        elif (node or current) not in seen:
            seen.add(node or current)
            waiting.append((current, True))
            if node is not None and node.op_type != "Shape":
                waiting += [(used, False) for used in node.inputs if used is not None]


def _is_computed(node: ir.Node | None) -> bool:
    """Whether the outputs of `node` can be computed if its inputs can."""
    if node is None or node.domain not in STANDARD_DOMAINS or node.op_type in (QUANTIZE, DEQUANTIZE):
        return False
    if node.op_type == "Shape":
        (x,) = node.inputs
        return x is not None and x.shape is not None and x.shape.is_static()
    return can_compute(node.op_type)


def _stored(tensor: ir.TensorProtocol) -> Array:
    if isinstance(tensor, ir.ExternalTensor):  # mapped anew: a tensor keeps its map, and with it the pages, for good
        old = tensor
        tensor = ir.ExternalTensor(
            old.location,
            old.offset,
            old.length,
            old.dtype,
            shape=old.shape,
            name=old.name or "",
            base_dir=old.base_dir,
        )
    return np.asarray(tensor.numpy())


def _constant_node(node: ir.Node) -> Array:
    (entry,) = node.attributes.values()
    if entry.type is ir.AttributeType.TENSOR:
        return np.asarray(entry.as_tensor().numpy())
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    return np.asarray(entry.value, kinds.get(entry.name))


def _shape_node(node: ir.Node) -> Array:
    assert node.inputs[0] is not None and node.inputs[0].shape is not None
    start, end = (entry.as_int() if entry else None for entry in map(node.attributes.get, ("start", "end")))
    return np.array(node.inputs[0].shape.numpy()[slice(start, end)], np.int64)


def insert(before: ir.Node, op_type: str, inputs: list[ir.Value | None], state: State, **attributes: Any) -> ir.Value:
    """The output of a new standard node in front of `before`, which passes on where it comes from."""
    node = ir.node(op_type, inputs, attributes=attributes)
    (output,) = node.outputs
    base = before.outputs[0].name or before.name or "value"
    output.name = state.name(f"{base}_{op_type.lower()}")
    node.name = output.name
    node.metadata_props.update(before.metadata_props)
    graph = before.graph
    assert graph is not None
    graph.insert_before(before, node)
    return output


def take_over(old: ir.Value, new: ir.Value, state: State) -> None:
    """Whatever reads `old` reads `new`, which gets its name: an output of the graph keeps it."""
    name = old.name
    new.type, new.shape = old.type, old.shape
    old.name = state.name(f"{name}_before")
    new.name = name
    own = new.producer()
    for user, index in list(old.uses()):
        if user is not own:
            user.replace_input_with(index, new)
    for graph in state.model.graphs():
        for index, value in enumerate(graph.outputs):
            if value is old:
                graph.outputs[index] = new


def follow(node: ir.Node, op_type: str, others: list[ir.Value | None], state: State, **attributes: Any) -> ir.Value:
    """The output of a new standard node behind `node`, which takes over from the output of `node`."""
    (old,) = node.outputs
    made = ir.node(op_type, [old, *others], attributes=attributes, metadata_props=dict(node.metadata_props))
    made.name = state.name(f"{old.name}_{op_type.lower()}")
    assert node.graph is not None
    node.graph.insert_after(node, made)
    take_over(old, made.outputs[0], state)
    return made.outputs[0]
