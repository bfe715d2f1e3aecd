"""`qcompile.quantize`: a model in, a quantized ExportedProgram out; `qcompile.calibrate`: the ranges it needs."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from passes.base import Decline, PassLog, run_pipeline
from passes.dependence import fixed_nodes, input_dependence
from passes.errors import PassError
from passes.graph import val
from passes.legalize.ranges import beyond
from passes.pipelines import NORMALIZE, quantize_pipeline, route
from passes.place.attention_scale import PlaceAttentionScale
from passes.place.pad_reduction import PadReduction
from passes.place.rotate import RotateLinears
from passes.places import OwnPasses, Placed
from passes.program import lift, unlift
from passes.quantize.insert import Quantizer, misfit
from passes.quantize.sites import Site, find_sites
from passes.subgraphs import graphs
from qcompile.capture import capture
from qcompile.capture.dimensions import noted_dimensions
from qcompile.errors import QCompileError, RecipeError
from qcompile.messages import some
from qcompile.process import alone
from qcompile.quantized import is_finished, refuse_quantized, refuse_quantized_graph
from qcompile.recipe import (
    QuantizerConfig,
    QuantizerName,
    Recipe,
    check_quantizes,
    format_of,
    load_recipe,
    resolve,
    unsupported,
)
from qcompile.recipe.notices import Notice
from qcompile.record import SITES, UNREACHED, QuantizeRecord, record
from qcompile.scales import activation_ranges, has_constant, largest_by_name, mask_state, scale_of, weight_amax

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
    passes: Sequence[Placed] | None = None,
) -> ExportedProgram:
    """Capture `model`, put quantize/dequantize where `recipe` says, and store weights as codes.

    Args:
        model: a module (it is not changed), or what `torch.export.export` made of one.
        args, kwargs: example inputs of a module.
        recipe: name of a shipped recipe, path of a YAML file, a mapping of the same shape, or a `Recipe`.
        calibration: representative batches, as argument tuples, keyword dicts, `(args, kwargs)` or single tensors;
            needed by recipes with static activations. They are run through the captured graph in the model's own
            dtype, and show what float16 would not hold, for every recipe; in an attention whose mask hides every key
            from some query of theirs, such queries get zeros. Or what `calibrate` returned. A layer that they never
            reach, or only with zeros, is not quantized, and listed as declined.
        dynamic_shapes: as in `torch.export.export`.
        dtype: what the quantized program computes in: torch.float16, bfloat16 or float32. None keeps a half-precision
            model's own and gives a float32 model float16: in float32 TensorRT fuses attention only where a quantizer
            reads what it gives, and multiplies slower what is not quantized. What calibration saw beyond 65504 is then
            an error; bfloat16 holds it. Inputs and outputs keep the dtypes of the model.
        progress: show a bar while calibrating.
        passes: passes of your own, each with its place: `[passes.after("fuse", MyPass)]`. What every pass promises is
            checked of them.

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
    chosen_recipe = load_recipe(recipe)
    compute_dtype(dtype, torch.float32)  # that it is one is known before the model is captured
    log = PassLog(own=OwnPasses(passes, route("quantize")))
    refuse_quantized(model)
    with alone():
        program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        gm = unlift(program)
        needed = input_dependence(gm)
        plan = planned(gm, chosen_recipe, log, required=True)
    source = model_dtype(gm)
    target = compute_dtype(dtype, source)
    weights = weight_amax(plan.configs)
    _check_range(weights, target)
    ranges = activation_ranges(gm, program, plan.configs, calibration, (source, target), progress)
    plan = replace(plan, configs=without(plan.configs, ranges.unreached, plan.log))
    with alone():
        quantize_graph(gm, plan, weights | ranges.amax, source, target, ranges.fully_masked)
        log.own.check_placed()
        check_dependence(needed, input_dependence(gm))
        quantized = lift(gm, program)
    if not is_finished(quantized):
        _tell_nothing(plan.log)
    notices = [*map(str, plan.notices), *ranges.notices, *plan.log.notices]
    name, log = chosen_recipe.metadata.name, plan.log
    seen = ranges.headroom, ranges.source, noted_dimensions(program)
    record(quantized, QuantizeRecord(name, log.fired, log.declined, notices, *seen))
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
        Name of the quantizer (`layers.0.q_proj.input_quantizer`) -> largest magnitude, a float32 scalar; and for each
        attention whose mask hid every key from some query, `layers.0.self_attn.fully_masked` -> True. It is the
        `calibration` of `quantize`, of any model with these modules, and that of `torch.compile(backend="qcompile")`;
        `torch.save` and safetensors keep it.

    Raises:
        CaptureError, RecipeError, CalibrationError: each names what is wrong and where.
    """
    chosen_recipe = load_recipe(recipe)
    refuse_quantized(model)
    with alone():
        program = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        gm = unlift(program)
        plan = planned(gm, chosen_recipe, required=True)
    same = (torch.float32, torch.float32)  # what the result will compute in is not known
    ranges = activation_ranges(gm, program, plan.configs, calibration, same, progress)
    for notice in ranges.notices:
        logger.warning("%s", notice)
    return largest_by_name(ranges.amax) | mask_state(ranges.fully_masked)


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


def planned(gm: GraphModule, recipe: Recipe, log: PassLog | None = None, *, required: bool = False) -> Plan:
    """Normalize `gm`, find what `recipe` quantizes, and put attention scales and rotations where quantizers see them.

    Args:
        required: `gm` is a whole model, so that a recipe which quantizes nothing of it is an error.

    Raises:
        QCompileError: the graph is quantized already. RecipeError: what the recipe wants is not supported.
    """
    refuse_quantized_graph(gm)
    log = run_pipeline(NORMALIZE, gm, log, recompile=False)
    sites = find_sites(gm)
    names = [QuantizerName(site.name, site.module_class) for site in sites]
    resolution = resolve(recipe, names)
    if required:
        check_quantizes(recipe, names, resolution)
    configs = {site: resolution.configs[site.name] for site in sites if site.name in resolution.configs}
    _check_supported(configs)
    configs = _useful(gm, configs, log)
    for notice in resolution.notices:
        logger.log(logging.WARNING if notice.is_warning else logging.INFO, "%s", notice)

    queries = {site.consumer for site in configs if site.operand == "q"}
    formats = {site: format_of(config) for site, config in configs.items()}
    blocks = {s.consumer: f.sizes[-1] for s, f in formats.items() if f.packed and s.operand in ("input", "weight")}
    run_pipeline((partial(PlaceAttentionScale, queries), partial(PadReduction, blocks)), gm, log, recompile=False)
    # not where `InsertQdq` will decline: a rotation that nothing is quantized behind is a product for nothing
    rotated = {s.consumer for s, config in configs.items() if config.rotate and not misfit(s.tensor, formats[s])}
    run_pipeline((partial(RotateLinears, rotated),), gm, log, recompile=False)
    return Plan(recipe, configs, resolution.notices, log)


def _useful(gm: GraphModule, configs: Mapping[Site, QuantizerConfig], log: PassLog) -> dict[Site, QuantizerConfig]:
    """`configs` less what gives the same at every call, which back ends store, and layers that would gain nothing."""
    fixed = {node for part in graphs(gm) for node in fixed_nodes(part)}
    reasons = {site: "no user input reaches it" if site.consumer in fixed else site.idle for site in configs}
    left = {site.consumer: (site.module, reason) for site, reason in reasons.items() if reason}
    for node, (module, reason) in left.items():
        log.declined.append(Decline(SITES, f"not quantized: {reason}", module, (node.name,)))
    return {site: config for site, config in configs.items() if site.consumer not in left}


def without(
    configs: Mapping[Site, QuantizerConfig], unreached: Mapping[Site, str], log: PassLog
) -> dict[Site, QuantizerConfig]:
    """`configs` less all operands of the layers and attentions in `unreached`, which has the reason for each: the other
    operands would be quantized for nothing.

    They are listed as declined in `log`, and a warning says so.
    """
    reasons: dict[Node, list[tuple[Site, str]]] = defaultdict(list)
    for site, reason in unreached.items():
        reasons[site.consumer].append((site, reason))
    for consumer, found in reasons.items():
        told = "; ".join(f"{site.suffix}: {reason}" for site, reason in found)
        log.declined.append(Decline(UNREACHED, f"not quantized: {told}", found[0][0].module, (consumer.name,)))
    if reasons:
        told = some([f"{found[0][0].module or 'the root'} ({found[0][1]})" for found in reasons.values()])
        logger.warning("not quantized, as calibration gave no range: %s; calibrate with data that reaches them", told)
    return {site: config for site, config in configs.items() if site.consumer not in reasons}


def quantize_graph(
    gm: GraphModule,
    plan: Plan,
    amax: Mapping[Site, torch.Tensor],
    source: torch.dtype,
    target: torch.dtype,
    fully_masked: Collection[Node] = (),
) -> None:
    """Carry `plan` out on its graph.

    Args:
        amax: of `weight_amax`, and of the activations that have constant scales; of others it has no effect.
        source: the dtype that the model computes in. target: the one that the result computes in.
        fully_masked: attentions whose mask hid every key from some query in calibration.
    """
    _tell_small_weights(plan, amax, target)

    def scale(site: Site, config: QuantizerConfig) -> torch.Tensor:
        known = config.constant_amax or 1.0  # probabilities are at most 1
        largest = amax.get(site, torch.tensor(known, dtype=torch.float32))
        return scale_of(largest, config, plan.recipe.calibration.power_of_two).to(val(site.tensor).device)

    quantizers = {
        site: Quantizer(format_of(config), scale(site, config) if has_constant(config) else None)
        for site, config in plan.configs.items()
        if site.operand != "softmax"
    }
    softmax = {site.consumer: scale(site, config) for site, config in plan.configs.items() if site.operand == "softmax"}
    pipeline = quantize_pipeline(quantizers, softmax, source, target, fully_masked)
    run_pipeline(pipeline, gm, plan.log, recompile=False)


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


def _check_range(weights: Mapping[Site, torch.Tensor], target: torch.dtype) -> None:
    """A weight that is infinite in the compute dtype would be dequantized to that without a word."""
    for site, value in weights.items():
        if (largest := float(value.max())) > torch.finfo(target).max:
            raise PassError(f"{site.name}: the largest weight is {largest:.3g}, and {beyond(target)}")


def _tell_nothing(log: PassLog) -> None:
    """A recipe that named layers, all of which were declined: the program is valid, and none of it quantized."""
    reasons = dict.fromkeys(f"{decline.module or 'the root'}: {decline.reason}" for decline in log.declined)
    told = f"nothing of this model is quantized, as everything that the recipe names was declined: {some([*reasons])}"
    log.notices.append(told)
    logger.warning("%s", told)


def _tell_small_weights(plan: Plan, amax: Mapping[Site, torch.Tensor], target: torch.dtype) -> None:
    """A weight of which the compute dtype keeps few digits, or none, if its format does not say so by its scale."""
    least = torch.finfo(target).smallest_normal
    small = {s.name: float(amax[s].max()) for s in plan.configs if s.operand == "weight" and 0 < amax[s].max() < least}
    if small:
        told = some([f"{name} ({largest:.3g})" for name, largest in small.items()])
        plan.log.notices.append(
            f"the largest weight is below the normal numbers of {target} in {told}: digits are lost"
        )
