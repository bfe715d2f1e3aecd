"""`qcompile.quantize`: a model in, a quantized ExportedProgram out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from passes.pipelines import route
from passes.places import OwnPasses, Placed
from qcompile.capture import capture
from qcompile.decoders import Cache, as_cache, captured_with_cache
from qcompile.frontends.quantized import refuse_quantized
from qcompile.process import old_objects_rest
from qcompile.quantization.dtypes import compute_dtype
from qcompile.quantization.plan import planned, unquantized
from qcompile.quantization.run import quantized_program
from qcompile.recipe import Recipe, load_recipe


@old_objects_rest()
def quantize(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe | Mapping[str, Any] | None = "fp8",
    calibration: Iterable[Any] | Mapping[str, torch.Tensor] | None = None,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    passes: Iterable[Placed] | Placed | None = None,
    cache: str | Cache | None = None,
) -> ExportedProgram:
    """Capture `model`, put quantize/dequantize where `recipe` says, and store weights as codes.

    Args:
        model: a module (it is not changed), or what `torch.export.export` made of one.
        args, kwargs: example inputs of a module.
        recipe: name of a shipped recipe, path of a YAML file, a mapping of the same shape, or a `Recipe`. None
            quantizes nothing: the program computes in `dtype`, and is what quantized ones are compared with.
        calibration: representative batches, as argument tuples, keyword dicts, `(args, kwargs)` or single tensors;
            needed by recipes with static activations. They are run through the captured graph in the model's own
            dtype, and show what float16 would not hold, for every recipe; in an attention whose mask hides every key
            from some query of theirs, such queries get zeros. Or what `calibrate` returned. A layer that they never
            reach, or only with zeros, is not quantized, and listed as declined.
        dynamic_shapes: as in `torch.export.export`.
        dtype: what the quantized program computes in: torch.float16, bfloat16 or float32. None keeps a half-precision
            model's own and gives a float32 model float16: in float32 TensorRT fuses attention only where a quantizer
            reads what it gives, and multiplies slower what is not quantized. What calibration saw beyond 65504 is then
            an error; bfloat16 holds it. Inputs and outputs keep the dtypes of the model, but for
            caches of keys and values, which are kept in this type.
        progress: show a bar while calibrating.
        passes: passes of your own, each with its place: `[passes.after("fuse", MyPass)]`. What every pass promises is
            checked of them.
        cache: capture a decoder of transformers with its keys and values as inputs and outputs: "dynamic", or a
            `qcompile.Cache`. Example inputs and dynamic shapes are then its own, and batches are `input_ids` with,
            where there is padding, `attention_mask`; the first half of each is a prompt, and the rest behind it.

    Returns:
        A program of the same signature with the operators of `passes.ir` in its graph; `torch.export.save` and
        `load` keep it (import qcompile before loading). It is for inference: its parameters are frozen, and its
        operators refuse where a gradient is wanted. What is not quantized and keeps its dtype shares memory with the
        model.

    Threads take turns at what traces, one of them at a time in a process; they calibrate side by side.

    Raises:
        CaptureError, RecipeError, CalibrationError, PassError: each names what is wrong and where. QCompileError: the
            model is quantized already.
    """
    planner = unquantized if recipe is None else partial(planned, recipe=load_recipe(recipe), whole=True)
    compute_dtype(dtype, torch.float32)  # that it is one is known before the model is captured
    own = OwnPasses(passes, route("quantize"))
    refuse_quantized(model)
    if cache is not None:
        program, calibration = captured_with_cache(model, as_cache(cache), calibration, dynamic_shapes, kwargs)
    else:
        program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    return quantized_program(program, planner, calibration, dtype, progress, own)
