"""`qcompile.repair_onnx`: an ONNX file of another tool in, a verified one of standard operators out."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from qcompile.errors import RepairError, VerificationError
from qcompile.onnx.checks.dependence import dependence
from qcompile.onnx.checks.forms import tensorrt
from qcompile.onnx.checks.opsets import opset_version
from qcompile.onnx.checks.structure import shapes, well_formed
from qcompile.onnx.checks.values import zero_points
from qcompile.onnx.foreign import TENSORRT, UNREAD, verify_foreign
from qcompile.onnx.library import LIBRARY_ERRORS
from qcompile.onnx.relu import relus_to_max
from qcompile.onnx.repair.arithmetic import fold_shapes
from qcompile.onnx.repair.biases import fold_biases
from qcompile.onnx.repair.casts import remove_casts
from qcompile.onnx.repair.codes import store_codes
from qcompile.onnx.repair.legacy import DEQUANTIZE, QUANTIZE, is_legacy, is_opaque, is_standard
from qcompile.onnx.repair.nbits import expand_nbits
from qcompile.onnx.repair.offsets import move_zero_points
from qcompile.onnx.repair.opset import raise_ir_version, raised
from qcompile.onnx.repair.qoperators import expand_qoperators
from qcompile.onnx.repair.report import RepairReport
from qcompile.onnx.repair.shapes import forget, infer
from qcompile.onnx.repair.signed import make_signed
from qcompile.onnx.repair.standardize import standardize
from qcompile.onnx.repair.state import Changes, State
from qcompile.onnx.repair.types import match_outputs, match_types
from qcompile.onnx.repair.unfit import float_weights, quantize_behind_pools
from qcompile.onnx.repair.weights import fold_weights
from qcompile.onnx.repair.zero_points import write_out_zero_points
from qcompile.onnx.save import onnx_folder, written_beside
from qcompile.onnx.verify import Check, require
from qcompile.onnx.view import ModelView, reads, walk
from qcompile.onnx.view import infer as infer_types
from qcompile.onnxfile.names import said
from qcompile.onnxfile.payload import SMALL_BYTES, data_file, embedded, is_external, payload_bytes
from qcompile.onnxfile.read import external_files, payload_problems
from qcompile.outputs import check_distinct


def repair_onnx(old: str | os.PathLike[str], new: str | os.PathLike[str]) -> RepairReport:
    """Write `new`, which computes what `old` does with standard ONNX operators that TensorRT takes.

    before:  weight -> trt::TRT_FP8QuantizeLinear -> trt::TRT_FP8DequantizeLinear -> Transpose -> MatMul    opset 17
    after:   FP8 weight, transposed               -> DequantizeLinear                          -> MatMul    opset 19

    before:  x        -> Q, DQ (uint8, zero point z) -> Gemm (weight w, bias in INT32)
    after:   x + s z' -> Q, DQ (int8)                -> Gemm (weight w, float bias - s z' sum(w))           z' = z - 128

    Legacy are `trt::TRT_FP8QuantizeLinear`, `trt::TRT_FP8DequantizeLinear`, and `QuantizeLinear`, `DequantizeLinear` in
    the domains `trt` and `com.microsoft`; operators on codes (QLinearConv, QGemm, MatMulNBits, ...) become Q/DQ, too.
    Weights are folded (float32 arithmetic), those of convolutions that no FP8 kernel takes into floats, shapes inferred
    anew, the opset is raised where it has to be. Operators that only TensorRT reads stay (`report.kept`). What is not
    quantized is not quantized by this.

    Args:
        old: an ONNX file; external data is found beside it. It is only read.
        new: another file. It is written beside that name, verified, and moved in place. Above 1.8 GB its weights go to
            `<new>.data`. Weights are read and written one at a time.

    Raises:
        RepairError: `old` is no ONNX model, is incomplete, or has a quantizer that standard operators cannot express;
            or `new` is `old`.
        VerificationError: the new file failed a check; it was not put in place. What TensorRT or standard tools do not
            take of a file that is right is a failed check of the report, with a notice, and the file is in place.
        OSError: the new file cannot be written.
    """
    source, destination = Path(old), Path(new)
    view = _read(source, destination)
    try:
        return _repair(view, destination)
    except LIBRARY_ERRORS as error:
        problem = _why_invalid(view)
        if problem is None:  # then it is not the file's fault
            raise
        raise RepairError(f"'{source}' is no valid ONNX file: {problem}") from error


def _why_invalid(view: ModelView) -> str | None:
    try:
        infer_types(view.flat)
        return next(iter(well_formed(view).problems), None)
    except LIBRARY_ERRORS as error:
        return said(error)


def _repair(view: ModelView, destination: Path) -> RepairReport:
    required = dependence(view)
    assert view.path is not None
    proto = raised(view.model, view.path)
    state = State(_model(proto, view.path))
    if state.model.functions:
        _inline_legacy(state.model)
    _rewrite(state)
    kept = Counter(f"{n.domain}::{n.op_type}" for n in state.nodes() if is_opaque(n, state.model))
    changed = bool(state.changes) or _is_untidy(view)  # only what has legacy operators gets another opset
    if changed:
        _finish(state)
    else:
        state = State(_model(view.model, view.path))  # with what it said of its types
    checks, after, refusals = _write(state, view, destination, changed, required)
    return _report(state, view, checks, changed, after, dict(kept), refusals)


def _rewrite(state: State) -> None:
    """What is rewritten, in order."""
    standardize(state)
    expand_qoperators(state)
    expand_nbits(state)
    forget(state)
    infer(state, strict=False)  # for the types of what goes into quantizers and comes out of Casts
    if match_outputs(state):
        forget(state)
        infer(state, strict=False)
    match_types(state)
    remove_casts(state)
    fold_weights(state)
    write_out_zero_points(state)
    fold_biases(state)
    float_weights(state)
    quantize_behind_pools(state)
    make_signed(state)
    store_codes(state)
    move_zero_points(state)
    state.changes.relus = relus_to_max(state.model)


def _finish(state: State) -> None:
    """Drop what is not used any more, infer what is left, and say what the file needs of its reader."""
    fold_shapes(state)
    raise_ir_version(state.model)
    common.RemoveInitializersFromInputsPass()(state.model)  # they could not be folded if a caller could replace them
    for tidy in (common.RemoveUnusedNodesPass(), common.RemoveUnusedOpsetsPass(), common.TopologicalSortPass()):
        tidy(state.model)
    forget(state)
    infer(state, strict=True)


def _read(source: Path, destination: Path) -> ModelView:
    """The file and all that it names, found good. Raises RepairError."""
    if destination.is_dir():
        raise RepairError(f"'{destination}' is a directory; name a file in it")
    try:
        view = ModelView(source)
    except VerificationError as error:
        raise RepairError(str(error)) from error
    if not view.model.ir_version or not view.model.graph.node or not opset_version(view.model):
        raise RepairError(f"'{source}' is no ONNX model: it has no nodes, IR version or opset")
    assert view.path is not None
    if problems := payload_problems(view.model, view.path):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise RepairError(f"'{source}' is incomplete: {problems[0]}{more}")
    _refuse_own_files(view, source, destination)
    return view


def _refuse_own_files(view: ModelView, source: Path, destination: Path) -> None:
    """The input is never changed: not through its own name, a link, or the file of its weights."""
    own = [("part of the old file, which is never changed", file) for file in (source, *_external_files(view))]
    for written in (destination, destination.with_name(f"{destination.name}.data")):
        check_distinct({"the new file": written}, own, RepairError)


def _external_files(view: ModelView) -> list[Path]:
    assert view.path is not None
    return external_files(view.model, view.path)


def _model(source: onnx.ModelProto, path: Path) -> ir.Model:
    """The model of onnx-ir, large weights left on disk, small ones read in: inference may need their values."""
    proto = onnx.ModelProto()
    proto.CopyFrom(source)
    for tensor in filter(is_external, proto.graph.initializer):
        if payload_bytes(tensor) <= SMALL_BYTES:
            tensor.CopyFrom(embedded(tensor, path))
            continue
        for entry in tensor.external_data:
            if entry.key == "location":  # in full: onnx-ir takes no link, and no file of two names, below a folder
                entry.value = str(data_file(entry.value, path))
    return ir.serde.deserialize_model(proto)


def _inline_legacy(model: ir.Model) -> None:
    """Legacy quantizers in the body of a function come into the graph, where their constants can be seen, and Relus,
    where the quantizers behind them can."""
    identifiers = set(model.functions)
    common.InlinePass(lambda f: any(is_legacy(node, identifiers) or is_standard(node, "Relu") for node in f))(model)


def _is_untidy(view: ModelView) -> bool:
    """Whether a file without legacy operators holds weights that nothing reads, or is wrong about its shapes."""
    read = {name for node in walk(view.model.graph) for name in reads(node)}
    read |= {value.name for value in view.model.graph.output}
    return any(tensor.name not in read for tensor in view.model.graph.initializer) or bool(shapes(view).problems)


@contextlib.contextmanager
def _copied_beside(view: ModelView, destination: Path) -> Iterator[Path]:
    """The old file, byte for byte, under the new name."""
    assert view.path is not None
    with onnx_folder(destination, RepairError) as folder:
        yield Path(shutil.copyfile(view.path, folder / destination.name))


def _write(
    state: State, view: ModelView, destination: Path, changed: bool, required: dict[str, set[str]]
) -> tuple[list[Check], int, list[str]]:
    """Write, verify, move in place; the verdicts, the size on disk, and what TensorRT refuses of the new file."""
    copies = not changed and not _external_files(view)
    with _copied_beside(view, destination) if copies else written_beside(state.model, destination, RepairError) as path:
        checks = verify_foreign(path, required)
        require(check for check in checks if check.name not in UNREAD)
        return checks, sum(file.stat().st_size for file in path.parent.iterdir()), _refusals(ModelView(path))


def _refusals(view: ModelView) -> list[str]:
    """What the repair leaves as it finds it, and TensorRT does not take."""
    problems = [*tensorrt(view).problems, *zero_points(view).problems]
    more = f" (and {len(problems) - 1} more of the kind)" if len(problems) > 1 else ""
    return [f"TensorRT does not take the new file: {problems[0]}{more}"] if problems else []


def _report(
    state: State,
    view: ModelView,
    checks: list[Check],
    changed: bool,
    after: int,
    kept: dict[str, int],
    refusals: list[str],
) -> RepairReport:
    assert view.path is not None
    found, model = state.changes, state.model
    quantizers = [node for node in state.nodes() if is_standard(node, QUANTIZE, DEQUANTIZE)]
    files = [view.path, *_external_files(view)]
    return RepairReport(
        changed=changed,
        opset=(opset_version(view.model), model.opset_imports[""]),
        ir_version=(view.model.ir_version, model.ir_version),
        standardized=dict(found.standardized),
        folded={name: said for name, said in found.folded.items() if name in model.graph.initializers},
        biases=found.biases,
        codes={name: said for name, said in found.codes.items() if name in model.graph.initializers},
        floats={name: said for name, said in found.floats.items() if name in model.graph.initializers},
        pools=found.pools,
        signed=found.signed,
        offsets=found.offsets,
        zero_points=found.zero_points,
        casts=found.casts,
        transposes=found.transposes,
        relus=found.relus,
        quantizers=dict(Counter(node.op_type for node in quantizers)),
        shapes=sum(node.outputs[0].shape is not None and node.outputs[0].dtype is not None for node in quantizers),
        kept=kept,
        notices=[*_notices(found, kept), *refusals],
        checks=checks,
        bytes=(sum(file.stat().st_size for file in files), after),
    )


def _reader(operator: str) -> str:
    return "only TensorRT" if operator.startswith(f"{TENSORRT}::") else "no standard tool"


def _notices(found: Changes, kept: dict[str, int]) -> list[str]:
    notices = [
        f"{count} {name} kept: {_reader(name)} reads this operator, so that nothing behind it could be checked"
        for name, count in kept.items()
    ]
    if found.zero_points:
        notices.append(
            f"{len(found.zero_points)} quantizers have a zero point other than 0, which TensorRT's FP8 has not: it is "
            "written out in float32, and the GEMMs behind them do not run in FP8"
        )
    return notices
