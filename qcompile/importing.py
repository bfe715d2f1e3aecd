"""`qcompile.import_quantized`: a model that another tool has quantized in, a quantized ExportedProgram out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from passes.base import run_pipeline
from passes.dependence import input_dependence
from passes.formats import FP8
from passes.graph import is_call
from passes.ir import DEQUANTIZE
from passes.pipelines import CANONICALIZE, quantize_pipeline
from passes.place.attention_scale import PlaceAttentionScale
from passes.program import lift, unlift
from passes.quantize.insert import Quantizer
from passes.quantize.sites import Site, find_sites
from passes.subgraphs import all_calls
from qcompile.capture import capture
from qcompile.capture.dimensions import noted_dimensions
from qcompile.errors import QCompileError
from qcompile.frontends import modelopt, torchao
from qcompile.process import alone
from qcompile.quantization import check_dependence, compute_dtype, model_dtype, without
from qcompile.recipe import QuantizerConfig
from qcompile.report.record import QuantizeRecord, record
from qcompile.scales import activation_ranges, scale_of

_TOOLS = (modelopt, torchao)


def import_quantized(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    calibration: Iterable[Any] | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> ExportedProgram:
    """Capture a model that is quantized already, with the codes and scales that it has.

    Args:
        model: what `qcompile.load_checkpoint` returned; a module that `modelopt.torch.quantization.quantize` or
            torchao's `quantize_` worked on; the graph of a pt2e quantizer, converted; or a program with their
            operators, or with those of `passes.ir`. It is not changed.
        args, kwargs, dynamic_shapes: as of `qcompile.quantize`.
        calibration: batches, as of `qcompile.quantize`, for what the model does not say: the range of q in an attention
            whose k and v are quantized, as in checkpoints with an FP8 key/value cache. Without it such an attention
            runs in half precision.
        dtype: what is not quantized is computed in this type; None as of `qcompile.quantize`. Codes stay as they are; a
            scale for a whole tensor or channel is rounded to it.
        progress: show a bar while calibrating.

    Returns:
        A program like that of `qcompile.quantize`, for the same back ends. Attention whose q, k and v are quantized
        gets a quantizer for its softmax, without which no kernel runs it in FP8.

    Raises:
        CaptureError, PassError; QCompileError if nothing in the model is quantized.
    """
    compute_dtype(dtype, torch.float32)  # that it is one is known before the model is captured
    with alone():
        with contextlib.ExitStack() as stack:
            for tool in _TOOLS:
                if isinstance(model, torch.nn.Module) and tool.is_quantized(model):
                    model = stack.enter_context(tool.capture_ready(model))
            program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        gm = unlift(program)
        needed = input_dependence(gm)
        log = run_pipeline(CANONICALIZE, gm, recompile=False)
        _check_quantized(gm)
        queries = [] if calibration is None else _unquantized_queries(gm)
        placing = (partial(PlaceAttentionScale, {site.consumer for site in queries}),)
        run_pipeline(placing, gm, log, recompile=False)
    source = model_dtype(gm)
    target = compute_dtype(dtype, source)
    configs = dict.fromkeys(queries, QuantizerConfig(FP8.name))
    ranges = activation_ranges(gm, program, configs, calibration, (source, target), progress)
    configs = without(configs, ranges.unreached, log)
    quantizers = {s: Quantizer(FP8, scale_of(ranges.amax[s], config, False)) for s, config in configs.items()}
    pipeline = quantize_pipeline(quantizers, None, source, target, ranges.fully_masked)
    with alone():
        run_pipeline(pipeline, gm, log, recompile=False)
        check_dependence(needed, input_dependence(gm))
        quantized = lift(gm, program)
    notices = [*ranges.notices, *log.notices]
    seen = ranges.headroom, ranges.source, noted_dimensions(program)
    record(quantized, QuantizeRecord("as imported", log.fired, log.declined, notices, *seen))
    return quantized


def _unquantized_queries(gm: GraphModule) -> list[Site]:
    """The queries of attentions whose keys and values are in FP8."""
    sites = (site for site in find_sites(gm) if site.operand == "q")
    return [s for s in sites if [_is_fp8(operand) for operand in s.consumer.args[:3]] == [False, True, True]]


def _is_fp8(operand: object) -> bool:
    return isinstance(operand, Node) and is_call(operand, DEQUANTIZE) and operand.kwargs["format"] == FP8.name


def _check_quantized(gm: GraphModule) -> None:
    if not any(all_calls(gm, DEQUANTIZE)):
        raise QCompileError(
            "nothing in this model is quantized: qcompile.quantize does that; import_quantized is for checkpoints of"
            " load_checkpoint and for models of nvidia-modelopt, torchao and pt2e"
        )
