"""Run an ONNX file and look inside: intermediate tensors, or each layer on the reference's inputs.

ONNX Runtime runs what it can; `onnx.reference` the rest, and the result says which did and why.

ONNX Runtime's CPU provider runs fp16 nodes in fp32 and does not round to fp16 between them, optimizations or not: over
Add -> Add, 22 % of the elements differ from those of two segments of one Add each. Bits of an fp16 file are comparable
node by node only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_reduce_mean import ReduceMean_18
from onnx.reference.ops.op_reduce_sum import ReduceSum_13

from qcompile.errors import VerificationError
from qcompile.onnx.extract import CARRIED, GIVEN, extract, live_nodes
from qcompile.onnx.session import import_onnxruntime, open_session
from qcompile.onnx.view import Array, ModelView, reads
from qcompile.onnxfile.payload import embedded, is_external
from qcompile.onnxfile.read import rebase

ORT = "onnxruntime"
REFERENCE = "onnx.reference"
_CODE_DTYPES: dict[str, Any] = {
    "tensor(float8e4m3fn)": ml_dtypes.float8_e4m3fn,
    "tensor(float8e5m2)": ml_dtypes.float8_e5m2,
}


@dataclass
class Execution:
    """Tensor values by name, which evaluator computed each, and why ONNX Runtime did not where it did not."""

    values: dict[str, Array] = field(default_factory=dict)
    evaluators: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def add(self, other: Execution) -> None:
        self.values.update(other.values)
        self.evaluators.update(other.evaluators)
        self.reasons.extend(reason for reason in other.reasons if reason not in self.reasons)


@dataclass(frozen=True, eq=False)  # told apart by identity: arrays have no truth value
class Segment:
    """A layer: the values of the tensors that go into it, the names of those that come out."""

    name: str
    inputs: Mapping[str, Array]
    outputs: Sequence[str]


def run_onnx_intermediates(
    path: str | os.PathLike[str] | onnx.ModelProto,
    feeds: Mapping[str, Array],
    names: Iterable[str],
    isolate: Mapping[str, Array] | None = None,
) -> Execution:
    """The values of tensors `names` (of the main graph, outputs or not) for the graph inputs `feeds`.

    `isolate`: tensor -> value that its users see in place of the computed one; the computed one can still be asked for.
    FP8 tensors come back as `ml_dtypes.float8_e4m3fn`, bfloat16 as `ml_dtypes.bfloat16`, bit for bit.
    """
    return _run(ModelView(path), {**feeds, **(isolate or {})}, list(dict.fromkeys(names)))


def run_onnx_layers(path: str | os.PathLike[str] | onnx.ModelProto, segments: Iterable[Segment]) -> Execution:
    """Run each segment on the inputs that it carries, so that no error of an earlier layer reaches it.

    One flipped FP8 code changes everything downstream: only this tells a wrong layer from a layer after one.
    All segments run in one session, each given tensor cut off from what computes it; a segment that has another's
    input inside, and all of them if ONNX Runtime refuses the whole, run on their own.

    Raises: VerificationError for a segment whose outputs need more than its inputs, or outputs named twice.
    """
    view, segments = ModelView(path), list(segments)
    names = [name for segment in segments for name in segment.outputs]
    if len(names) != len(set(names)):
        raise VerificationError(f"outputs of two segments: {sorted({n for n in names if names.count(n) > 1})}")
    given = {name: value for segment in segments for name, value in segment.inputs.items()}
    joint = [segment for segment in segments if _joins(view, segment, given)]
    alone = [segment for segment in segments if segment not in joint]
    result = Execution()
    if joint:
        try:
            wanted = [name for segment in joint for name in segment.outputs]
            result.add(_run_ort(view, {n: v for s in joint for n, v in s.inputs.items()}, wanted))
        except _ort_refusals():
            alone = segments
    for segment in alone:
        result.add(_run(view, segment.inputs, list(segment.outputs)))
    return result


def _joins(view: ModelView, segment: Segment, given: Mapping[str, Array]) -> bool:
    """True if cutting all of `given` at once changes nothing inside `segment`. Raises if its inputs do not suffice."""
    inside = live_nodes(view.model.graph, segment.inputs, segment.outputs)
    if any(given[name] is not value and not _same(given[name], value) for name, value in segment.inputs.items()):
        return False
    return not any(name in given and name not in segment.inputs for node in inside for name in reads(node))


def _same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _run(view: ModelView, given: Mapping[str, Array], wanted: list[str]) -> Execution:
    try:
        return _run_ort(view, given, wanted)
    except _ort_refusals() as error:
        model = extract(view, given, wanted)
        for tensor in filter(is_external, model.graph.initializer):
            tensor.CopyFrom(embedded(tensor, view.path))
        inputs = {value.name for value in model.graph.input}
        feeds = {GIVEN.format(name): value for name, value in given.items() if GIVEN.format(name) in inputs}
        outputs = ReferenceEvaluator(model, new_ops=[MatMul, ReduceMean, ReduceSum]).run(None, feeds)
        values = {name: _restored(view, name, np.asarray(out)) for name, out in zip(wanted, outputs, strict=True)}
        return Execution(values, dict.fromkeys(wanted, REFERENCE), [f"ONNX Runtime: {' '.join(str(error).split())}"])


class MatMul(OpRun):  # the evaluator knows it by the name of the class
    """MatMul of half-precision operands as hardware does it, with sums in float32; numpy has no fast one in half."""

    op_domain = ""

    def _run(self, a: Array, b: Array) -> tuple[Array]:
        if a.dtype.itemsize > 2:
            return (np.matmul(a, b),)
        return (np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype),)


class _WideSum:
    """A sum of half-precision numbers in float32; numpy's in bfloat16 stands still at 256."""

    op_domain = ""

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[Array]:
        x, *axes = inputs
        wide = x.astype(np.float32) if x.dtype.itemsize <= 2 else x
        (result,) = super()._run(wide, *axes, **attributes)  # type: ignore[misc]  # of the evaluator's class
        return (result.astype(x.dtype),)


class ReduceMean(_WideSum, ReduceMean_18):
    pass


class ReduceSum(_WideSum, ReduceSum_13):
    pass


def _run_ort(view: ModelView, given: Mapping[str, Array], wanted: list[str]) -> Execution:
    ort = import_onnxruntime()
    model = extract(view, given, wanted)
    inputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    options = ort.SessionOptions()
    # What the file says is compared, not what an optimizer makes of it: a fused GELU differs in the last bit.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    folder = None if view.path is None else rebase(model, view.path)
    serialized = model.SerializeToString()
    del model  # with weights inside the file: one copy fewer while ONNX Runtime makes its own
    session = open_session(serialized, sess_options=options, external_data_dir=folder)
    del serialized
    feeds = {
        GIVEN.format(name): _ort_value(np.asarray(value), inputs[GIVEN.format(name)])
        for name, value in given.items()
        if GIVEN.format(name) in inputs
    }
    types = [output.type for output in session.get_outputs()]
    values = {}
    for name, elem_type, array in zip(wanted, types, session.run(None, feeds), strict=True):
        # ONNX Runtime hands FP8 out as uint8: the same bits under another name.
        values[name] = _restored(view, name, array.view(_CODE_DTYPES.get(elem_type, array.dtype)))
    return Execution(values, dict.fromkeys(wanted, ORT))


def _ort_value(value: Array, elem_type: int) -> Any:
    """What ONNX Runtime takes for `value`: numpy, or for types that its numpy bridge lacks their bits and the type."""
    if value.dtype.isbuiltin == 1:
        return value
    bits = np.ascontiguousarray(value).view(np.uint8 if value.dtype.itemsize == 1 else np.uint16)
    return import_onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type(bits.reshape(value.shape), elem_type)


def _restored(view: ModelView, name: str, value: Array) -> Array:
    """`value` in the tensor's own dtype, after a carrier type brought it out of the graph."""
    elem_type = view.elem_type(name)
    return value.astype(helper.tensor_dtype_to_np_dtype(elem_type), copy=False) if elem_type else value


def _ort_refusals() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for an operator or a type that it has no kernel for. Bad feeds are not among them."""
    import_onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.NotImplemented, state.InvalidGraph, state.Fail, state.RuntimeException)


__all__ = ["CARRIED", "ORT", "REFERENCE", "Execution", "Segment", "run_onnx_intermediates", "run_onnx_layers"]
