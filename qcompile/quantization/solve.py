"""Scales and codes of a planned graph: the steps of its recipe, one after another, then `max` for what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from passes.errors import PassError
from passes.legalize.ranges import beyond
from passes.quantize.insert import Quantizer, misfit
from passes.quantize.sites import Site
from qcompile.algorithms import ask
from qcompile.algorithms.base import Algorithm, Operand, View
from qcompile.algorithms.max import Max
from qcompile.algorithms.ranks import ranks
from qcompile.algorithms.scales import is_calibrated, scale_of
from qcompile.algorithms.settings import MaxSettings
from qcompile.algorithms.share import Share
from qcompile.algorithms.statistics import Largest, Statistic
from qcompile.capture.batch_forms import calibration_form
from qcompile.errors import CalibrationError, RecipeError
from qcompile.messages import some
from qcompile.quantization.headroom import Headroom
from qcompile.quantization.kept import Kept
from qcompile.quantization.parts import parts_of, solve_parts
from qcompile.quantization.plan import Plan, Work
from qcompile.quantization.seen import Observation
from qcompile.quantization.sequential import Segments
from qcompile.quantization.shards import Shard
from qcompile.quantization.sharing import kept_of, observation_of
from qcompile.quantization.state import is_state, known_amax, known_masks
from qcompile.quantization.view import graph_view
from qcompile.recipe import format_of
from qcompile.report.ranges import RangeGrowth

NEVER = "calibration never reached it"
ZEROS = "it was zero in all of calibration"

Calibration = Iterable[Any] | Mapping[str, torch.Tensor] | None
"""Batches, what `qcompile.calibrate` returned, or nothing."""


@dataclass(frozen=True)
class Data:
    """What there is to calibrate with.

    Attributes:
        calibration: batches, a state, or nothing.
        program: what batches are run through; None where there can be a state only.
        how: what to do where activations have constant scales and there is nothing. progress: show a bar.
        share: the batches that are seen here; None for those of this rank, or all where there is no process group.
    """

    calibration: Calibration
    program: ExportedProgram | None = None
    how: str = ""
    progress: bool = False
    share: Share | None = None


@dataclass
class Solution:
    """What calibration found.

    Attributes:
        quantizers: of weights, and of activations with a constant scale that calibration found.
        unreached: activations that have no range -> why.
        weights: largest magnitude of each weight, of all that share a scale.
        headroom: how near the tensors came to the end of the compute dtype; empty without data.
        notices: what the user should know of the data, or of the lack of it.
        fully_masked: the attentions whose mask hid every key from some query.
        ranges: how ranges grew over the data; None where there is nothing to compare.
        source: what ranges were found on, for metadata. batches: how many were seen here.
    """

    quantizers: dict[Site, Quantizer] = field(default_factory=dict)
    unreached: dict[Site, str] = field(default_factory=dict)
    weights: dict[Site, torch.Tensor] = field(default_factory=dict)
    headroom: list[Headroom] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    fully_masked: set[Node] = field(default_factory=set)
    ranges: RangeGrowth | None = None
    source: str = ""
    batches: int = 0


def solve(work: Work, plan: Plan, data: Data, dtypes: tuple[torch.dtype, torch.dtype]) -> Solution:
    """Run the steps of `plan`.

    Args:
        dtypes: that of the model, and that of the program.

    Raises:
        CalibrationError: data is missing or does not fit, a tensor has no finite range, or one leaves the compute
            dtype. PassError: a weight does.
    """
    source, target = dtypes
    static = [s for s, c in plan.configs.items() if s.operand not in ("weight", "softmax") and is_calibrated(c)]
    weights = [site for site in plan.configs if site.operand == "weight"]
    ragged = {site for site in weights if misfit(site.tensor, format_of(plan.configs[site]))}
    calibration, state, kept = data.calibration, None, None
    if is_state(calibration):
        if (part := Shard.read(calibration)) is not None:
            raise CalibrationError(f"this is the state of {part.share} alone: `qcompile merge` joins those of all")
        state, calibration = calibration, None
        kept = kept_of(state, plan, data.program)
    asked = [site for site in (*weights, *(static if state is None or kept else ())) if site not in ragged]
    view = graph_view(work.gm, {site: plan.configs[site] for site in asked}, target, plan.configs)
    found = Solution(weights={operand.site: view.amax(operand) for operand in view.weights})
    _check_range(found.weights, target)
    observation = None
    if kept is not None and state is not None:
        found.fully_masked, found.source = known_masks(work.gm, state), "given statistics"
    elif state is not None:
        _take_state(found, work, plan, static, state, dtypes)
    elif calibration is not None:
        assert data.program is not None
        again = len(plan.steps) > 1 or any(_walks_again(step, view) for step in plan.steps)
        share = data.share or ranks()
        observation = observation_of(work.gm, data.program, plan, calibration, dtypes, again, data.progress, share)
    elif static:
        raise CalibrationError(f"the recipe gives static scales to {some([s.name for s in static])}{_how(data)}")
    quantizers, seen = _run_steps(work, plan, view, observation, kept)
    if seen is not view:
        found.weights = {operand.site: seen.amax(operand) for operand in view.weights}
    found.notices += view.notices
    found.quantizers |= {operand.site: chosen for operand, chosen in quantizers.items()}
    # which `InsertQdq` declines with the reason, so that nobody looks for scales and codes of them
    found.quantizers |= {site: Quantizer(format_of(plan.configs[site]), None) for site in ragged}
    if observation is not None:
        _take_observation(found, view, quantizers, observation, target)
    else:
        if kept is not None:
            _take_kept(found, view, quantizers, kept, dtypes)
        found.notices += _unknown_ranges(source, target)
    return found


def _run_steps(
    work: Work, plan: Plan, view: View, observation: Observation | None, known: Kept | None
) -> tuple[dict[Operand, Quantizer], View]:
    """What the steps chose, and the graph as it is after their edits."""
    quantizers: dict[Operand, Quantizer] = {}
    rest = Max(MaxSettings(power_of_two=plan.power_of_two))
    for index, step in enumerate((*plan.steps, rest)):
        wanted = [operand for operand in view.operands if operand not in quantizers] if step is rest else view.operands
        part = view.of(wanted, quantizers)
        if step.sequential and observation is not None:
            quantizers |= Segments(observation, _of_activations(plan, view, quantizers, observation)).solve(step, part)
            continue
        if observation is not None and len(parts := parts_of(step, part)) > 1:
            quantizers |= solve_parts(step, part, parts, observation)
            continue
        watched = ask.watch(step, part)
        if known is not None and known.has(step, watched):
            quantizers |= ask.solve(step, part, known.of(step, watched))
            continue
        if observation is None and _lacks(step, watched):
            quantizers |= ask.solve(step, replace(part, notices=[]), {})  # what it does, is said in one notice
            view.notices.append(step.without_data or "")
            continue
        seen = _observed(watched, view, observation)
        if pipeline := ask.edits(step, part, seen):
            if quantizers:
                raise RecipeError(
                    f"calibration[{index}]: {step.settings.algorithm} changes the graph that the steps before it have"
                    " chosen scales for: put it in front of them"
                )
            if work.run(pipeline):
                view = View(view.operands, view.groups, gm=work.gm, configs=view.configs, notices=view.notices)
                if observation is not None:
                    observation.forget()
                part = view
        quantizers |= ask.solve(step, part, seen)
    ask.check_groups(view, quantizers)
    return quantizers, view


def _of_activations(
    plan: Plan, view: View, quantizers: Mapping[Operand, Quantizer], observation: Observation
) -> dict[Site, Quantizer]:
    """The quantizers of all that is no weight, with the ranges of `max` where no step has chosen others yet."""
    known = {site: plan.uncalibrated(config) for site, config in plan.configs.items() if site.operand != "weight"}
    rest = Max(MaxSettings(power_of_two=plan.power_of_two))
    left = view.of([operand for operand in view.activations if operand not in quantizers], quantizers)
    watched = ask.watch(rest, left)
    chosen = dict(quantizers) | ask.solve(rest, left, observation.of(watched, {}))
    # where there is no range, nothing came, or zeros only
    ranges = {operand.site: chosen.get(operand) for operand in view.activations}
    return {site: found for site, q in known.items() if (found := ranges.get(site, q)) is not None}


def _walks_again(step: Algorithm[Any], view: View) -> bool:
    """Whether data may have to be walked more than once for it."""
    return step.sequential or type(step).edits is not Algorithm.edits or len(parts_of(step, view)) > 1


def _lacks(step: Algorithm[Any], watched: Mapping[Node, Statistic]) -> bool:
    """Whether it does without the data that it would watch. Raises CalibrationError if it cannot."""
    if watched and step.without_data is None:
        raise CalibrationError(
            f"the recipe's algorithm {step.settings.algorithm} needs calibration data: batches of inputs, which no"
            " calibrated state stands for"
        )
    return bool(watched)


def _observed(
    watched: Mapping[Node, Statistic], view: View, observation: Observation | None
) -> Mapping[Node, Statistic]:
    if observation is None:
        return {}
    # what no step takes gets the scale of `max`: its range is seen on the same walk
    return observation.of(watched, {operand.node: Largest() for operand in view.activations})


def _take_observation(
    found: Solution,
    view: View,
    quantizers: Mapping[Operand, Quantizer],
    observation: Observation,
    target: torch.dtype,
) -> None:
    watch = observation.watch
    assert watch is not None
    if observation.samples is None:
        found.notices.append(f"calibration data is not used: the recipe needs none, and no range ends in {target}")
        return
    left = [operand for operand in view.activations if operand not in quantizers]
    for operand, largest in zip(left, _largest(observation, left), strict=True):
        found.unreached[operand.site] = ZEROS if largest.reached else NEVER
    notices = observation.notices
    if not watch.statistics and not observation.asked:
        notices = [
            "calibration data is used to see what masks hide, and for nothing else: the recipe needs none, and no range"
            f" ends in {target}"
        ]
    found.headroom, found.fully_masked = watch.headroom(), watch.fully_masked
    found.notices += [*watch.check(), *notices]
    found.ranges = _growth(observation, view)
    if found.ranges is not None and not found.ranges.suffices:
        found.notices.append(str(found.ranges))
    found.batches = observation.batches_seen
    found.source = f"{observation.samples} sample{'s' * (observation.samples != 1)}"


def _take_kept(
    found: Solution,
    view: View,
    quantizers: Mapping[Operand, Quantizer],
    kept: Kept,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    """What a state with statistics says beside scales."""
    ranges = {operand: Largest() for operand in view.activations}
    kept.of(Max(MaxSettings()), {operand.node: largest for operand, largest in ranges.items()})
    largest = {operand.site: one.value for operand, one in ranges.items()}
    _check_state(largest, dtypes)
    for operand, one in ranges.items():
        if operand not in quantizers:
            found.unreached[operand.site] = ZEROS if one.reached else NEVER


def _growth(observation: Observation, view: View) -> RangeGrowth | None:
    """Of what has a constant scale; q, k and v that read one tensor have one range."""
    names: dict[Largest, str] = {}
    for operand, largest in zip(view.activations, _largest(observation, view.activations), strict=True):
        names.setdefault(largest, operand.name)
    return observation.ranges.growth(names) if observation.ranges is not None else None


def _largest(observation: Observation, operands: list[Operand]) -> list[Largest]:
    wanted: dict[Node, Statistic] = {operand.node: Largest() for operand in operands}
    kept = observation.of(wanted, {})
    return [largest for operand in operands if isinstance(largest := kept[operand.node], Largest)]


def _take_state(
    found: Solution,
    work: Work,
    plan: Plan,
    static: list[Site],
    state: Mapping[str, torch.Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    """The ranges of what `qcompile.calibrate` returned."""
    amax, found.unreached = known_amax(static, state)
    _check_state(amax, dtypes)
    for site, value in amax.items():
        if float(value):
            config = plan.configs[site]
            scale = scale_of(value, config, plan.power_of_two)
            found.quantizers[site] = Quantizer(format_of(config), scale, amax=value)
    found.fully_masked, found.source = known_masks(work.gm, state), "given ranges"


def _check_state(amax: Mapping[Site, torch.Tensor], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """A range of a state that the compute dtype does not hold."""
    source, target = dtypes
    limit = torch.finfo(target).max
    if source != target and (over := [f"{s.name} ({float(a):.3g})" for s, a in amax.items() if float(a) > limit]):
        raise CalibrationError(f"the calibrated state holds larger ranges in {some(over)}, and {beyond(target)}")


def _check_range(weights: Mapping[Site, torch.Tensor], target: torch.dtype) -> None:
    """A weight that is infinite in the compute dtype would be dequantized to that without a word."""
    for site, value in weights.items():
        if (largest := float(value.max())) > torch.finfo(target).max:
            raise PassError(f"{site.name}: the largest weight is {largest:.3g}, and {beyond(target)}")


def _how(data: Data) -> str:
    """How to give what is missing."""
    if data.program is None:
        return f": {data.how}"
    return (
        ", which need calibration data: use a recipe with dynamic activations such as fp8_per_channel_per_token, or"
        " give batches in the form of the example inputs, many of them in the place of this one:\n "
        f" {calibration_form(data.program)}"
    )


def _unknown_ranges(source: torch.dtype, target: torch.dtype) -> list[str]:
    if target is not torch.float16 or source is target:
        return []
    return [
        f"no calibration data: whether every tensor stays below {torch.finfo(target).max:.5g}, where {target} ends, is"
        " not known"
    ]
