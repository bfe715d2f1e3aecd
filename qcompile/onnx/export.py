"""`qcompile.export_onnx`: a quantized program in, a verified ONNX file and a report out."""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import re
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from passes.base import PassLog, run_pipeline
from passes.formats import get_format
from passes.graph import place_of
from passes.ir import DEQUANTIZE
from passes.pipelines import BLOCKS_TO_CHANNELS, PORTABLE, RESTORE, TENSORRT, TENSORRT_KERNELS, boundary, route
from passes.places import OwnPasses, Pipeline, Placed
from passes.program import lift, unlift
from passes.subgraphs import all_calls, all_nodes, graphs, held, operator_name, owner, subgraph_calls
from qcompile.compat.onnx import LOGGERS, quick_translation
from qcompile.errors import ExportError
from qcompile.messages import some
from qcompile.onnx.biases import biases_to_rows
from qcompile.onnx.costs import cost_notices
from qcompile.onnx.empty import allow_empty
from qcompile.onnx.fp4 import FP4_IR_VERSION, FP4_OPSET, as_float4, uses_fp4
from qcompile.onnx.functions import DOMAIN, body_of
from qcompile.onnx.int4 import INT4_OPSET, uses_int4
from qcompile.onnx.interface import (
    by_name,
    check_interface,
    complex_notices,
    name_dimensions,
    name_interface,
    required_dependence,
)
from qcompile.onnx.names import describe, name_nodes
from qcompile.onnx.numerics import compare_layers
from qcompile.onnx.ops import translation_table
from qcompile.onnx.optimize import optimize
from qcompile.onnx.own_codes import separate_codes
from qcompile.onnx.relu import relus_to_max
from qcompile.onnx.restate import restate_shapes
from qcompile.onnx.save import written_beside
from qcompile.onnx.session import import_onnxruntime
from qcompile.onnx.tidy import tidy
from qcompile.onnx.verify import require, verify_onnx
from qcompile.onnxfile.refused import MAY_LACK, no_operator
from qcompile.outputs import check_room, check_writable
from qcompile.process import alone, old_objects_rest
from qcompile.report import Report
from qcompile.report.coverage import Modules
from qcompile.report.record import QuantizeRecord, record_of
from qcompile.sizes import program_bytes
from qcompile.version import __version__

Target = Literal["tensorrt", "portable"]
BlockFp8 = Literal["k_split", "per_channel"]
OPSETS = range(19, 24)
IO_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DEFAULT_OPSET = 21
_BFLOAT16_OPSET = 22  # before it HardSwish, Softplus, Elu, Mish and others have no bfloat16
_PIPELINES: Mapping[Target, Pipeline] = {"tensorrt": TENSORRT, "portable": PORTABLE}
_KERNELS: Mapping[Target, Pipeline] = {"tensorrt": TENSORRT_KERNELS, "portable": RESTORE}
_BLOCK_FP8 = {"k_split": (), "per_channel": BLOCKS_TO_CHANNELS}
# Spellings that torch.onnx traces a program again for, and what it knows them as.
_PLAIN = {
    torch.ops.aten.__and__.Tensor: torch.ops.aten.bitwise_and.Tensor,
    torch.ops.aten.__or__.Tensor: torch.ops.aten.bitwise_or.Tensor,
    torch.ops.aten.__xor__.Tensor: torch.ops.aten.bitwise_xor.Tensor,
}
_WRITTEN_WITH_GRAPHS = ("cond", "while_loop", "scan", "invoke_subgraph")


@old_objects_rest()
def export_onnx(
    program: ExportedProgram,
    path: str | os.PathLike[str],
    *,
    target: Target = "tensorrt",
    opset: int | None = None,
    block_fp8: BlockFp8 = "k_split",
    io_dtype: torch.dtype | None = None,
    compare: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    passes: Iterable[Placed] | Placed | None = None,
) -> Report:
    """Lower `program` to an ONNX file, check it, and tell what is in it.

    Args:
        program: what `qcompile.quantize` returned (or a plain exported program); it is not changed.
        path: where the file goes. It is written beside that name, checked, and moved in place, so an older file stays
            whole if anything fails. Above 1.8 GB the weights go to `<path>.data`.
        target: `tensorrt` for the forms that TensorRT fuses into the fewest kernels; `portable` for standard operators
            only, in the shape of the model.
        opset: 19 to 23; None is 21, 22 for a program in bfloat16, 23 where NVFP4 needs it.
        block_fp8: how linear layers with FP8 weights in blocks of 128 x 128 are written: `k_split` multiplies block by
            block, exactly, and writes the products of all blocks to memory; `per_channel` quantizes the weights once
            more, with one scale for each channel, and the activations per token. The report tells what it costs.
        io_dtype: float16, bfloat16 or float32, of the file's floating-point inputs and outputs; None is that of the
            program's, which a conversion of what it computes in has left as they were. What is between stays the same.
        compare: a batch, as in calibration, on which every layer of the file is compared with the program.
        input_names, output_names: what the file calls them, in the order of the program; without them inputs are called
            as the model calls its arguments, and outputs by their keys, else `output`, `output_1`. Dynamic dimensions
            are called as their `torch.export.Dim`.
        passes: passes of your own, each with its place: `[passes.after("legalize", MyPass)]`.

    Threads take turns: one program is lowered at a time, and files are checked and compared side by side.

    Raises:
        ExportError: names do not fit the program, an operator has no ONNX form, or the opset is out of range.
        VerificationError: the file failed a check; it was not put in place.
    """
    opset = _check(program, target, opset, block_fp8, io_dtype)
    log = PassLog(own=OwnPasses(passes, route(target)))
    destination, noted = Path(path), record_of(program)
    check_writable(destination, error=ExportError, parents=True)
    check_room({destination: program_bytes(program)}, ExportError)
    if compare is not None:
        import_onnxruntime()
    with (
        alone(),
        torch.no_grad(),
    ):  # a learned attention bias would make torch trace the form of SDPA that has a gradient
        gm = unlift(program)
        needed = required_dependence(gm, program)
        log = run_pipeline(_KERNELS[target], gm, log)
        modules = Modules.of(gm, [*noted.declined, *log.declined])
        run_pipeline((*_BLOCK_FP8[block_fp8], *_PIPELINES[target], *boundary(io_dtype)), gm, log)
        log.own.check_placed()
        costs = cost_notices(gm, log)
        _check_subgraphs(gm)
        for node in all_calls(gm, *_PLAIN):
            node.target = _PLAIN[node.target]  # type: ignore[index]
        lowered = lift(gm, program)
        converted = _convert(lowered, opset)
    check_interface(converted.exported_program)  # made functional now, so that every write is in the open
    allow_empty(converted.model)
    tidy(converted.model)
    relus_to_max(converted.model)
    biases_to_rows(converted.model)
    name_interface(converted.model, program, input_names, output_names)
    name_dimensions(converted.model, noted.dimensions)
    _say_where_from(converted.model, noted, target)
    _add_functions(converted.model, opset)
    restate_shapes(converted.model)
    if target == "tensorrt":
        separate_codes(converted.model)
        costs += _not_for_tensorrt(converted.model)
    costs += complex_notices(program)
    name_nodes(converted.model)
    if uses_fp4(program):
        converted.model.ir_version = max(converted.model.ir_version, FP4_IR_VERSION)

    with written_beside(converted.model, destination) as written:
        checks = verify_onnx(written, by_name(needed, program, converted.model))
        require(checks)
        comparison = compare_layers(written, converted, program, compare) if compare is not None else None
        size = sum(file.stat().st_size for file in written.parent.iterdir())
    return _report(noted, modules, log, converted.model, target, opset, costs, checks, comparison, size)


def modules_of(program: ExportedProgram, target: Target) -> Modules:
    """What of `program` a file for `target` has quantized: what has no kernel there is in floating point."""
    with alone(), torch.no_grad():
        gm = unlift(program)
        log = run_pipeline(_KERNELS[target], gm)
        return Modules.of(gm, [*record_of(program).declined, *log.declined])


def _say_where_from(model: onnx_ir.Model, noted: QuantizeRecord, target: Target) -> None:
    """Keep in the file's metadata what made it: readers show it, and nothing depends on it."""
    known = {"recipe": noted.recipe, "calibration": noted.calibration, "target": target, "version": __version__}
    model.metadata_props.update({f"qcompile.{key}": value for key, value in known.items() if value})


def _add_functions(model: onnx_ir.Model, opset: int) -> None:
    """Put the bodies of TensorRT's operators that `model` calls beside its graph."""
    called = {node.op_type: node for node in model.graph.all_nodes() if node.domain == DOMAIN}
    for name in sorted(called):
        function = body_of(called[name], opset)
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = 1


def _check_subgraphs(gm: GraphModule) -> None:
    """Raises ExportError for a call that holds graphs, and that torch.onnx does not write."""
    for node in (node for part in gm.modules() if isinstance(part, GraphModule) for node in subgraph_calls(part.graph)):
        if operator_name(node) not in _WRITTEN_WITH_GRAPHS:
            if held(owner(node), node):
                instead = (
                    f"write it with {', '.join(_WRITTEN_WITH_GRAPHS[:3])} of torch, or attention as"
                    " scaled_dot_product_attention"
                )
            else:
                instead = "write this part with other operators, or compute it outside of the exported model"
            called = next((a for a in node.args if isinstance(a, torch._ops.OpOverload)), None)
            name = operator_name(node) + (f" of {called}" if called is not None else "")
            raise ExportError(f"{place_of(node)}: {name} has no form in ONNX: {instead}")


def _not_for_tensorrt(model: onnx_ir.Model) -> list[str]:
    """A notice where TensorRT-RTX will refuse the file."""
    nodes = [onnx_ir.to_proto(node) for node in model.graph.all_nodes() if node.op_type in MAY_LACK]
    found = [f"{describe(node)}, which {why[0]}" for node in nodes if (why := no_operator(node)) is not None]
    return [f"TensorRT-RTX will refuse this file, as it has no operator for {some(found)}"] if found else []


def _check(program: object, target: str, opset: int | None, block_fp8: str, io_dtype: torch.dtype | None) -> int:
    if not isinstance(program, ExportedProgram):
        raise ExportError(f"a {type(program).__name__} is not a program: give what qcompile.quantize returns")
    check_interface(program)
    if target not in _PIPELINES:
        raise ExportError(f"unknown target {target!r}; known: {', '.join(_PIPELINES)}")
    if block_fp8 not in _BLOCK_FP8:
        raise ExportError(f"unknown block_fp8 {block_fp8!r}; known: {', '.join(_BLOCK_FP8)}")
    if io_dtype not in (None, *IO_DTYPES):
        raise ExportError(f"unknown io_dtype {io_dtype!r}; known: {', '.join(map(str, IO_DTYPES))}")
    if opset is not None and opset not in OPSETS:
        raise ExportError(
            f"opset {opset} is not supported: FP8 needs 19 or later, and torch.onnx writes up to {OPSETS[-1]}"
        )
    if opset is not None and opset < FP4_OPSET and uses_fp4(program):
        raise ExportError(f"opset {opset} has no FP4; leave `opset` out, or give {FP4_OPSET}")
    if powers := sorted(name for name in _formats(program) if get_format(name).powers):
        raise ExportError(
            f"the program has weights in {' and '.join(powers)}, for which neither TensorRT-RTX nor ONNX Runtime has a"
            " kernel: save it as a checkpoint, run it by torch.compile, or quantize with nvfp4, int4 or fp8"
        )
    if opset is not None and opset < INT4_OPSET and uses_int4(program):
        raise ExportError(f"opset {opset} has no INT4; leave `opset` out, or give {INT4_OPSET} or more")
    bfloat16 = io_dtype is torch.bfloat16 or _uses_bfloat16(program)
    return opset or (FP4_OPSET if uses_fp4(program) else _BFLOAT16_OPSET if bfloat16 else _DEFAULT_OPSET)


def _formats(program: ExportedProgram) -> set[str]:
    return {str(node.kwargs["format"]) for node in all_calls(program.graph_module, DEQUANTIZE)}


def _uses_bfloat16(program: ExportedProgram) -> bool:
    values = (node.meta.get("val") for node in all_nodes(program.graph_module))
    return any(isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16 for value in values)


def _convert(lowered: ExportedProgram, opset: int) -> Any:
    """The lowered program as an ONNXProgram of torch.onnx."""
    retrace, written = lowered.run_decompositions, lowered

    def decomposed(table: Container[object]) -> ExportedProgram:
        nonlocal written
        written = retrace(table) if _needs_retrace(lowered, table) else lowered
        as_float4(written)  # a trace would undo it
        return written

    setattr(lowered, "run_decompositions", decomposed)  # noqa: B010  # on this object alone, which nobody else has
    with _quiet(), quick_translation():
        try:
            converted = torch.onnx.export(
                lowered,
                dynamo=True,
                opset_version=opset,
                custom_translation_table=translation_table(opset),
                optimize=False,
                verbose=False,
            )
            assert converted is not None
            optimize(converted.model)
            return converted
        except (torch.onnx.errors.OnnxExporterError, onnx_ir.passes.PassError) as error:
            cause = _root_cause(error)
            told = _untranslated(cause, written) or _in_loop(lowered.graph_module)
            raise ExportError(told or f"torch.onnx could not export the program: {cause}") from error


def _untranslated(cause: str, program: ExportedProgram) -> str | None:
    """What to say where `cause` is that an operator of `program` has no translation; None for another cause."""
    found = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'\)>", cause)
    if found is None:
        return None
    name = f"{found[1]}.{found[2]}"
    places = list(dict.fromkeys(place_of(node) for node in all_nodes(program.graph_module) if str(node.target) == name))
    return (
        f"{some(places) or 'the program'}: torch.onnx does not write {found[1]}; write this part with other operators,"
        " or compute it outside of the exported model"
    )


def _in_loop(gm: GraphModule) -> str | None:
    """What to say where a graph in the graph of a while_loop holds another, which onnx-ir 1.1 fails on."""
    for part in graphs(gm):
        for call in subgraph_calls(part.graph):
            for body in held(part, call).values() if operator_name(call) == "while_loop" else ():
                for inner in subgraph_calls(body.graph):
                    return (
                        f"{place_of(inner)}: torch.onnx writes no {operator_name(inner)} in a while_loop; write the"
                        " choice with torch.where, or the loop as a scan"
                    )
    return None


def _root_cause(error: BaseException) -> str:
    """The first line of the error that the others were raised from, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().partition("\n")[0] or type(error).__name__


def _needs_retrace(program: ExportedProgram, table: Container[object]) -> bool:
    """Whether the decompositions that torch.onnx asks for would change `program`: tracing it again takes a third of the
    time of an export."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem and not _is_size(node):
            known = isinstance(node.target, torch._ops.OpOverload)
            if not known or node.target in table or node.target._schema.is_mutable:
                return True
    return False


def _is_size(node: Node) -> bool:
    """Whether `node` makes a size of others, as `past + sequence`: no decomposition changes it."""
    return getattr(node.target, "__module__", "") in ("_operator", "operator") and not isinstance(
        node.meta.get("val"), torch.Tensor
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's notes on absent packages, its deprecations, outputs that are None, and what it cannot fold."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _report(
    record: QuantizeRecord,
    modules: Modules,
    log: PassLog,
    model: onnx_ir.Model,
    target: str,
    opset: int,
    costs: list[str],
    checks: list[Any],
    comparison: Any,
    size: int,
) -> Report:
    return Report(
        target=target,
        opset=opset,
        recipe=record.recipe,
        ops=dict(Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in model.graph.all_nodes()).most_common()),
        quantized=modules.quantized,
        unquantized=modules.unquantized,
        reasons=modules.reasons,
        coverage=modules.coverage,
        declined=[*record.declined, *log.declined],
        fired=dict(Counter(record.fired) + log.fired),
        notices=[*record.notices, *log.notices, *costs],
        checks=checks,
        comparison=comparison,
        bytes=size,
        headroom=record.headroom,
        ranges=record.ranges,
        convolutions=modules.convolutions,
        low_rank=modules.low_rank,
    )
