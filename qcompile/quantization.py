"""`qcompile.quantize`: a model in, a quantized ExportedProgram out."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

import passes.ir  # noqa: F401  # registers the operators that a saved program holds
from passes.base import Decline, PassLog, run_pipeline
from passes.constants import evaluate_constant, is_constant_expression
from passes.formats import FP8_PER_TOKEN, get_format
from passes.pipelines import NORMALIZE, quantize_pipeline
from passes.place.attention_scale import PlaceAttentionScale
from passes.program import lift, unlift
from passes.quantize.insert import Quantizer
from passes.quantize.sites import Site, find_sites
from qcompile.calibrate import observe_amax
from qcompile.capture import capture
from qcompile.errors import CalibrationError, QCompileError, RecipeError
from qcompile.recipe import Notice, QuantizerConfig, QuantizerName, Recipe, load_recipe, resolve, unsupported

logger = logging.getLogger("qcompile")

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_META = "qcompile"  # key of the record in program.graph_module.meta


@dataclass
class QuantizeRecord:
    """What `quantize` did, kept with the program for reports (in memory; a saved program does not carry it).

    Attributes:
        recipe: name of the recipe.
        fired: pass -> number of rewrites.
        declined: what passes left as it was, and why.
        notices: rules of the recipe that had no effect.
    """

    recipe: str = ""
    fired: dict[str, int] = field(default_factory=dict)
    declined: list[Decline] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)


def record_of(program: ExportedProgram) -> QuantizeRecord:
    """What `quantize` noted on `program`; an empty record for a program that was loaded or made elsewhere."""
    record = program.graph_module.meta.get(_META)
    return record if isinstance(record, QuantizeRecord) else QuantizeRecord()


def quantize(
    model: torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    recipe: str | Recipe | Mapping[str, Any] = "fp8",
    calibration: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> ExportedProgram:
    """Capture `model`, put quantize/dequantize where `recipe` says, and store weights as codes.

    Args:
        model: a module (it is not changed), or what `torch.export.export` made of one.
        args, kwargs: example inputs of a module.
        recipe: name of a shipped recipe, path of a YAML file, or a `Recipe`.
        calibration: representative batches, as argument tuples, keyword dicts or single tensors; needed by recipes
            with static activations. They are run through the captured graph in the model's own dtype.
        dynamic_shapes: as in `torch.export.export`.
        dtype: what the quantized program computes in: torch.float16, bfloat16 or float32. None keeps a half-precision
            model's own and gives a float32 model float16, as TensorRT fuses no FP8 attention in float32. Inputs and
            outputs keep the dtypes of the model.
        progress: show a bar while calibrating.

    Returns:
        A program of the same signature with `qcompile::quantize` / `dequantize` in its graph; `torch.export.save` and
        `load` keep it (import qcompile before loading).

    Raises:
        CaptureError, RecipeError, CalibrationError, PassError: each names what is wrong and where.
    """
    chosen_recipe = load_recipe(recipe)
    if dtype not in (None, *COMPUTE_DTYPES):
        raise QCompileError(f"cannot compute in {dtype}; known: {', '.join(map(str, COMPUTE_DTYPES))}")
    program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    gm = unlift(program)
    log = run_pipeline(NORMALIZE, gm)

    sites = find_sites(gm)
    resolution = resolve(chosen_recipe, [QuantizerName(site.name, site.module_class) for site in sites])
    configs = {site: resolution.configs[site.name] for site in sites if site.name in resolution.configs}
    _check_supported(configs)
    for notice in resolution.notices:
        logger.info("%s", notice)

    planned = {site.consumer for site in configs if site.operand == "q"}
    run_pipeline((partial(PlaceAttentionScale, planned),), gm, log)

    source = model_dtype(gm)
    target = dtype or (source if source in (torch.float16, torch.bfloat16) else torch.float16)
    amax = _weight_amax(gm, configs) | _activation_amax(gm, program, configs, calibration, progress)
    power_of_two = chosen_recipe.calibration.power_of_two
    quantizers = {
        site: Quantizer(_format(config), None if config.dynamic else _scale(amax[site], config, power_of_two))
        for site, config in configs.items()
        if site.operand != "softmax"
    }
    softmax = {
        site.consumer: _scale(torch.tensor(1.0), config, power_of_two)
        for site, config in configs.items()
        if site.operand == "softmax"
    }
    run_pipeline(quantize_pipeline(quantizers, softmax, source, target), gm, log)
    quantized = lift(gm, program)
    quantized.graph_module.meta[_META] = _record(chosen_recipe, log, resolution.notices)
    return quantized


def model_dtype(gm: GraphModule) -> torch.dtype:
    """The floating-point dtype that most of a graph's parameters have; float32 if it has none."""
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for parameter in gm.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__) if sizes else torch.float32


def _check_supported(configs: Mapping[Site, QuantizerConfig]) -> None:
    for site, config in configs.items():
        reason = unsupported(config)
        if reason:
            raise RecipeError(f"{site.name}: {reason}")


def _format(config: QuantizerConfig) -> Any:
    return FP8_PER_TOKEN if config.granularity == "per_token" else get_format(config.format)


def _weight_amax(gm: GraphModule, configs: Mapping[Site, QuantizerConfig]) -> dict[Site, torch.Tensor]:
    """Largest magnitude of each quantized weight, per tensor or `[N, 1]`.

    Per-tensor weights of one module that read the same tensor (q, k, v; gate, up) share the largest, so that they can
    be merged and any server can load them as one.
    """
    amax: dict[Site, torch.Tensor] = {}
    groups: dict[tuple[Node, str, str], list[Site]] = defaultdict(list)
    for site, config in configs.items():
        if site.operand != "weight":
            continue
        weight = evaluate_constant(gm, site.tensor)
        if config.granularity == "per_channel":
            low, high = torch.aminmax(weight, dim=1, keepdim=True)
        else:
            low, high = torch.aminmax(weight)
        amax[site] = torch.maximum(-low, high).float()
        if not bool(torch.isfinite(amax[site]).all()):  # aminmax carries a NaN on
            raise CalibrationError(f"{site.name}: the weight holds NaN or infinity")
        if config.granularity != "per_channel":
            source = site.consumer.args[0]
            assert isinstance(source, Node)
            groups[source, site.module.rpartition(".")[0], config.format].append(site)
    for group in groups.values():
        shared = torch.stack([amax[site] for site in group]).amax()
        amax.update(dict.fromkeys(group, shared))
    return amax


def _activation_amax(
    gm: GraphModule,
    program: ExportedProgram,
    configs: Mapping[Site, QuantizerConfig],
    calibration: Iterable[Any] | None,
    progress: bool,
) -> dict[Site, torch.Tensor]:
    """Calibrated largest magnitude of each tensor that is quantized with a constant scale."""
    static = [s for s, config in configs.items() if s.operand not in ("weight", "softmax") and not config.dynamic]
    if not static:
        return {}
    constants = [site for site in static if is_constant_expression(site.tensor)]
    if constants:
        raise CalibrationError(f"{constants[0].name}: the input is a constant, which no calibration can change")
    if calibration is None:
        names = ", ".join(site.name for site in static[:3])
        more = f" and {len(static) - 3} more" if len(static) > 3 else ""
        raise CalibrationError(
            f"the recipe gives static scales to {names}{more}, which need calibration data: pass calibration=batches,"
            " or use a recipe with dynamic activations such as fp8_per_channel_per_token"
        )
    observed = observe_amax(gm, program, {s.tensor: s.name for s in static}, calibration, progress=progress)
    return {site: observed[site.tensor] for site in static}


def _scale(amax: torch.Tensor, config: QuantizerConfig, power_of_two: bool) -> torch.Tensor:
    """amax / max, in float32; 1 where a tensor is all zeros, so that its codes are zeros."""
    scale = amax / get_format(config.format).max
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _record(recipe: Recipe, log: PassLog, notices: Sequence[Notice]) -> QuantizeRecord:
    return QuantizeRecord(recipe.metadata.name, dict(log.fired), list(log.declined), list(notices))
