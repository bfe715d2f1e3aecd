"""`qcompile.calibrate`: the ranges that `quantize` needs, for a model that is quantized later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompile.algorithms.share import Share
from qcompile.capture import capture
from qcompile.decoders import Cache, as_cache, captured_with_cache
from qcompile.frontends.quantized import refuse_quantized
from qcompile.quantization.plan import planned
from qcompile.quantization.run import calibrated_state
from qcompile.recipe import Recipe, load_recipe


def calibrate(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe | Mapping[str, Any] = "fp8",
    calibration: Iterable[Any],
    dynamic_shapes: Any = None,
    progress: bool = True,
    cache: str | Cache | None = None,
    shard: tuple[int, int] | None = None,
    weights: bool = False,
) -> dict[str, torch.Tensor]:
    """The ranges of activations that `recipe` gives constant scales to, for a model that is quantized later.

    Args: as of `quantize`, and

        shard: (2, 8) sees every eighth batch, from the second on; `merge_states` makes of what all eight return what
            one process would have returned. Each of them gets all of `calibration`, and takes its own.
        weights: also return what algorithms such as gptq keep for weights, so that `quantize` can do without data: the
            second moment of a layer with K inputs takes 16 K^2 bytes. Else they solve weights as without data.

    Returns:
        Name of the quantizer (`layers.0.q_proj.input_quantizer`) -> largest magnitude, a float32 scalar; and for each
        attention whose mask hid every key from some query, `layers.0.self_attn.fully_masked` -> True. It is the
        `calibration` of `quantize`, of any model with these modules, and that of `torch.compile(backend="qcompile")`;
        `torch.save` and safetensors keep it.

    Raises:
        CaptureError, RecipeError, CalibrationError: each names what is wrong and where.
    """
    chosen_recipe = load_recipe(recipe)
    share = None if shard is None else Share.of_shard(shard)
    refuse_quantized(model)
    if cache is not None:
        program, calibration = captured_with_cache(model, as_cache(cache), calibration, dynamic_shapes, kwargs)
    else:
        program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    planner = partial(planned, recipe=chosen_recipe, whole=True)
    return calibrated_state(program, planner, calibration, progress, share, weights)
