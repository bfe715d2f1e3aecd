"""`qcompile.import_quantized`: a model that another tool has quantized in, a quantized ExportedProgram out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from passes.ir import DEQUANTIZE
from passes.pipelines import route
from passes.places import OwnPasses, Placed
from passes.subgraphs import all_calls
from qcompile.capture import capture
from qcompile.decoders import Cache, as_cache, captured_with_cache
from qcompile.errors import QCompileError
from qcompile.frontends import modelopt, torchao
from qcompile.process import alone
from qcompile.quantization.dtypes import compute_dtype
from qcompile.quantization.plan import Plan, Work, quantized_elsewhere
from qcompile.quantization.run import quantized_program

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
    passes: Iterable[Placed] | Placed | None = None,
    cache: str | Cache | None = None,
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
        passes: passes of your own, as of `qcompile.quantize`.
        cache: as of `qcompile.quantize`. Where the model quantizes keys and values, as checkpoints with an FP8
            key/value cache do, the cache is in FP8.

    Returns:
        A program like that of `qcompile.quantize`, for the same back ends. Attention whose q, k and v are quantized
        gets a quantizer for its softmax, without which no kernel runs it in FP8.

    Raises:
        CaptureError, PassError; QCompileError if nothing in the model is quantized.
    """
    compute_dtype(dtype, torch.float32)  # that it is one is known before the model is captured
    own = OwnPasses(passes, route("import"))
    with alone(), contextlib.ExitStack() as stack:
        for tool in _TOOLS:
            if isinstance(model, torch.nn.Module) and tool.is_quantized(model):
                model = stack.enter_context(tool.capture_ready(model))
        if cache is not None:
            program, calibration = captured_with_cache(model, as_cache(cache), calibration, dynamic_shapes, kwargs)
        else:
            program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    planner = partial(_plan, calibrated=calibration is not None)
    return quantized_program(program, planner, calibration, dtype, progress, own)


def _plan(work: Work, calibrated: bool) -> Plan:
    plan = quantized_elsewhere(work, queries=calibrated)
    if not any(all_calls(work.gm, DEQUANTIZE)):
        raise QCompileError(
            "nothing in this model is quantized: qcompile.quantize does that; import_quantized is for checkpoints of"
            " load_checkpoint and for models of nvidia-modelopt, torchao and pt2e"
        )
    return plan
