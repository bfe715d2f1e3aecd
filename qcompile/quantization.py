"""`qcompile.quantize`: a model in, a quantized ExportedProgram out; `qcompile.calibrate`: the ranges it needs."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from passes.base import PassLog, run_pipeline
from passes.errors import PassError
from passes.graph import calls, input_dependence, val
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.pipelines import NORMALIZE, quantize_pipeline
from passes.place.attention_scale import PlaceAttentionScale
from passes.place.rotate import RotateLinears
from passes.program import lift, unlift
from passes.quantize.insert import Quantizer, misfit
from passes.quantize.sites import Site, find_sites
from qcompile.capture import capture
from qcompile.errors import QCompileError, RecipeError
from qcompile.recipe import QuantizerConfig, QuantizerName, Recipe, load_recipe, resolve, unsupported
from qcompile.recipe.notices import Notice
from qcompile.record import QuantizeRecord, record
from qcompile.scales import activation_amax, format_of, has_constant, scale_of, weight_amax

logger = logging.getLogger("qcompile")

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantize(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe | Mapping[str, Any] = "fp8",
    calibration: Iterable[Any] | Mapping[str, torch.Tensor] | None = None,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> ExportedProgram:
    """Capture `model`, put quantize/dequantize where `recipe` says, and store weights as codes.

    Args:
        model: a module (it is not changed), or what `torch.export.export` made of one.
        args, kwargs: example inputs of a module.
        recipe: name of a shipped recipe, path of a YAML file, a mapping of the same shape, or a `Recipe`.
        calibration: representative batches, as argument tuples, keyword dicts or single tensors; needed by recipes
            with static activations. They are run through the captured graph in the model's own dtype. Or what
            `calibrate` returned.
        dynamic_shapes: as in `torch.export.export`.
        dtype: what the quantized program computes in: torch.float16, bfloat16 or float32. None keeps a half-precision
            model's own and gives a float32 model float16, as TensorRT fuses no FP8 attention in float32. Inputs and
            outputs keep the dtypes of the model.
        progress: show a bar while calibrating.

    Returns:
        A program of the same signature with the operators of `passes.ir` in its graph; `torch.export.save` and
        `load` keep it (import qcompile before loading).

    Raises:
        CaptureError, RecipeError, CalibrationError, PassError: each names what is wrong and where.
    """
    chosen_recipe = load_recipe(recipe)
    compute_dtype(dtype, torch.float32)  # that it is one is known before the model is captured
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    gm = unlift(program)
    needed = input_dependence(gm)
    plan = planned(gm, chosen_recipe)
    amax = weight_amax(gm, plan.configs) | activation_amax(gm, program, plan.configs, calibration, progress)
    source = model_dtype(gm)
    quantize_graph(gm, plan, amax, source, compute_dtype(dtype, source))
    check_dependence(needed, input_dependence(gm))
    quantized = lift(gm, program)
    record(quantized, QuantizeRecord(chosen_recipe.metadata.name, plan.log.fired, plan.log.declined, plan.notices))
    return quantized


def calibrate(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe | Mapping[str, Any] = "fp8",
    calibration: Iterable[Any],
    dynamic_shapes: Any = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """The ranges of activations that `recipe` gives constant scales to, for a model that is quantized later.

    Args: as of `quantize`.

    Returns:
        Name of the quantizer (`layers.0.q_proj.input_quantizer`) -> largest magnitude, a float32 scalar. It is the
        `calibration` of `quantize`, of any model with these modules, and that of `torch.compile(backend="qcompile")`;
        `torch.save` and safetensors keep it.

    Raises:
        CaptureError, RecipeError, CalibrationError: each names what is wrong and where.
    """
    chosen_recipe = load_recipe(recipe)
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    gm = unlift(program)
    plan = planned(gm, chosen_recipe)
    amax = activation_amax(gm, program, plan.configs, calibration, progress)
    return {site.name: value for site, value in amax.items()}


@dataclass(frozen=True)
class Plan:
    """What a recipe wants of a normalized graph.

    Attributes:
        recipe: the recipe.
        configs: the quantizers that are switched on.
        notices: rules of the recipe that had no effect, or that say why they are there.
        log: what the passes did so far.
    """

    recipe: Recipe
    configs: Mapping[Site, QuantizerConfig]
    notices: list[Notice]
    log: PassLog


def planned(gm: GraphModule, recipe: Recipe, log: PassLog | None = None) -> Plan:
    """Normalize `gm`, find what `recipe` quantizes, and put attention scales and rotations where quantizers see them.

    Raises:
        QCompileError: the graph is quantized already. RecipeError: what the recipe wants is not supported.
    """
    if any(calls(gm.graph, QUANTIZE, DEQUANTIZE)):
        raise QCompileError(
            "this model is quantized already: give it to qcompile.import_quantized, or quantize what it was made from"
        )
    log = run_pipeline(NORMALIZE, gm, log, recompile=False)
    sites = find_sites(gm)
    resolution = resolve(recipe, [QuantizerName(site.name, site.module_class) for site in sites])
    configs = {site: resolution.configs[site.name] for site in sites if site.name in resolution.configs}
    _check_supported(configs)
    for notice in resolution.notices:
        logger.info("%s", notice)

    queries = {site.consumer for site in configs if site.operand == "q"}
    # not where `InsertQdq` will decline: a rotation that nothing is quantized behind is a product for nothing
    rotated = {s.consumer for s, config in configs.items() if config.rotate and not misfit(s.tensor, format_of(config))}
    placing = (partial(PlaceAttentionScale, queries), partial(RotateLinears, rotated))
    run_pipeline(placing, gm, log, recompile=False)
    return Plan(recipe, configs, resolution.notices, log)


def quantize_graph(
    gm: GraphModule,
    plan: Plan,
    amax: Mapping[Site, torch.Tensor],
    source: torch.dtype,
    target: torch.dtype,
) -> None:
    """Carry `plan` out on its graph.

    Args:
        amax: of `weight_amax`, and of the activations that have constant scales.
        source: the dtype that the model computes in. target: the one that the result computes in.
    """
    _check_range(amax, target)

    def scale(site: Site, config: QuantizerConfig) -> torch.Tensor:
        largest = amax.get(site, torch.tensor(1.0, dtype=torch.float32))  # probabilities are at most 1
        return scale_of(largest, config, plan.recipe.calibration.power_of_two).to(val(site.tensor).device)

    quantizers = {
        site: Quantizer(format_of(config), scale(site, config) if has_constant(config) else None)
        for site, config in plan.configs.items()
        if site.operand != "softmax"
    }
    softmax = {site.consumer: scale(site, config) for site, config in plan.configs.items() if site.operand == "softmax"}
    run_pipeline(quantize_pipeline(quantizers, softmax, source, target), gm, plan.log, recompile=False)


def model_dtype(gm: GraphModule) -> torch.dtype:
    """The floating-point dtype that most of a graph's parameters have; float32 if it has none."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for parameter in gm.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__) if sizes else torch.float32


def compute_dtype(asked: torch.dtype | None, source: torch.dtype) -> torch.dtype:
    """What a program computes in: what was `asked` for, else the model's own half precision, float16 for others."""
    if asked not in (None, *COMPUTE_DTYPES):
        raise QCompileError(f"cannot compute in {asked}; known: {', '.join(map(str, COMPUTE_DTYPES))}")
    return asked or (source if source in (torch.float16, torch.bfloat16) else torch.float16)


def check_dependence(needed: list[set[str]], found: list[set[str]]) -> None:
    """No output may have lost an input on the way, baked into a constant or cut off by a rewrite."""
    for index, lost in enumerate(before - after for before, after in zip(needed, found, strict=True)):
        if lost:
            raise PassError(f"output {index} no longer depends on {', '.join(sorted(lost))}: a pass cut it off")


def _check_supported(configs: Mapping[Site, QuantizerConfig]) -> None:
    for site, config in configs.items():
        reason = unsupported(config)
        if reason:
            raise RecipeError(f"{site.name}: {reason}")


def _check_range(amax: Mapping[Site, torch.Tensor], target: torch.dtype) -> None:
    """A weight that is infinite or all zeros in the compute dtype would be dequantized to that without a word."""
    limits = torch.finfo(target)
    for site, value in amax.items():
        largest = float(value.max())
        if site.operand == "weight" and (largest > limits.max or 0 < largest < limits.smallest_normal):
            raise PassError(
                f"{site.name}: the largest weight is {largest:.3g}, which {target} cannot hold; compute in bfloat16 or"
                " float32, or leave this layer unquantized in the recipe"
            )
