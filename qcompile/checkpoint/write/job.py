"""What `save_checkpoint` is to write, put together from its arguments before anything is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from passes.base import Decline
from qcompile.algorithms.base import Algorithm, make, told
from qcompile.checkpoint.formats import CheckpointFormat, Contents, format_called
from qcompile.checkpoint.formats.merged import describe
from qcompile.checkpoint.formats.servers import server_notices
from qcompile.checkpoint.hub.layout import Layer
from qcompile.checkpoint.hub.origin import Origin, open_origin
from qcompile.checkpoint.hub.wrappers import plain_names
from qcompile.checkpoint.write.activations import KvScales, refuse_latent, uncovered
from qcompile.checkpoint.write.plan import (
    Plan,
    contents_of,
    estimated_bytes,
    plan_program,
    plan_recipe,
    sibling_groups,
    unwritten_notice,
)
from qcompile.checkpoint.write.program import NO_CONVOLUTIONS, ProgramWeights, read_program
from qcompile.checkpoint.write.report import CheckpointReport
from qcompile.checkpoint.write.solve import Solver
from qcompile.errors import CheckpointError
from qcompile.frontends.quantized import refuse_quantized
from qcompile.outputs import check_room
from qcompile.recipe import Recipe, load_recipe
from qcompile.report.coverage import KINDS
from qcompile.report.record import SITES, UNREACHED, record_of

HUB = "Checkpoint"  # what declined a layer that checkpoints hold in floating point
DEFAULT_RECIPES = {"fp8": "fp8_block"}  # the one thing that this format holds


@dataclass
class Job:
    """What to write.

    Attributes:
        origin: the model before it was quantized.
        recipe: its name.
        steps: the algorithms that choose scales. power_of_two: those that no step chooses are rounded up to one.
        weights: of a program; None where weights are quantized here.
        kv_scales: name of an attention on the hub -> fp32 (k, v) scales.
        declined: what was, when the program was quantized.
    """

    origin: Origin
    plan: Plan
    recipe: str
    steps: tuple[Algorithm[Any], ...] = ()
    power_of_two: bool = False
    weights: ProgramWeights | None = None
    kv_scales: dict[str, KvScales] = field(default_factory=dict)
    declined: Sequence[Decline] = ()

    def solver(self) -> Solver:
        """What chooses the scales of weights that are quantized here."""
        groups = [] if self.weights else sibling_groups(self.plan.schemes, self.plan.configs)
        parts = {name: layer.parts for name, layer in self.origin.hub.layers.items()}
        return Solver(self.plan, groups, parts, self.origin.stored, self.steps, self.power_of_two)


def read_job(model: Any, source: Any, recipe: Any, format: str) -> Job:
    """What `save_checkpoint` was asked for; the arguments and errors are its own."""
    if not isinstance(model, ExportedProgram):
        if source is not None:
            raise CheckpointError("source= is for a program: a directory or a model is its own")
        if isinstance(model, torch.nn.Module):
            refuse_quantized(model)
        if recipe is None and format not in DEFAULT_RECIPES:
            raise CheckpointError(
                f"format {format} holds many schemes: say which with recipe=, such as nvfp4_weight_only"
            )
        chosen = load_recipe(recipe if recipe is not None else DEFAULT_RECIPES[format])
        origin = open_origin(model)
        plan = plan_recipe(chosen, origin.hub)
        plan.notices[:0] = origin.notices
        steps = make(chosen.steps)
        plan.notices += told(steps)
        job = Job(origin, plan, chosen.metadata.name, steps, chosen.power_of_two)
        plan.notices += job.solver().check()
        job.kv_scales = {origin.hub.attentions[path].name: scales for path, scales in plan.kv_scales.items()}
        return job
    if source is None:
        raise CheckpointError("a program needs source=, the directory or the model that it was made from")
    if recipe is not None:
        raise CheckpointError("a program is quantized already: leave out recipe=")
    weights = read_program(model)
    origin = open_origin(source)
    weights.layers = plain_names(weights.layers, origin.hub.layers)
    weights.kv_scales = plain_names(weights.kv_scales, origin.hub.attentions)
    weights.edited = plain_names(weights.edited, origin.stored)
    _check_edited(weights.edited, origin)
    plan = plan_program({name: weight.scheme for name, weight in weights.layers.items()}, origin.hub)
    if weights.convolutions:
        plan.left[NO_CONVOLUTIONS] = list(plain_names(weights.convolutions, origin.hub.layers))
    noted = record_of(model)
    unreached = [f"{d.module}: {d.reason}" for d in noted.declined if d.pass_name in (UNREACHED, SITES)]
    plan.notices = [*origin.notices, *noted.notices, *unreached, *plan.notices, *weights.notices]
    job = Job(origin, plan, noted.recipe, weights=weights, declined=noted.declined)
    job.kv_scales = _kv_scales(job, weights)
    plan.kv_cache = bool(job.kv_scales)
    return job


def check_names(source: str, directory: Path, format: str, recipe: Recipe) -> CheckpointReport:
    """Refuse, before a model is loaded and calibrated, what could not be written after it.

    Returns what would be written where calibration leaves no layer out, and no files.
    """
    origin, fmt = open_origin(source), format_called(format)
    plan = plan_recipe(recipe, origin.hub, calibrated=True)
    contents, shapes = contents_of(plan, origin.hub)
    fmt.check(contents, shapes)
    size = estimated_bytes(plan, origin, fmt)
    check_room({directory.resolve(): size}, CheckpointError)
    notices = [*origin.notices, *plan.all_notices, *notices_of(fmt, contents, shapes)]
    return CheckpointReport(
        **layers_of(plan, origin),
        format=format,
        recipe=recipe.metadata.name,
        kv_cache=contents.kv_cache,
        notices=notices,
        files=[],
        bytes=size,
        seconds=0.0,
    )


def notices_of(fmt: CheckpointFormat, contents: Contents, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """What the format, and the servers that read it, make of such a checkpoint."""
    return [*fmt.notices(contents, shapes), *server_notices(fmt.name, contents)]


def layers_of(plan: Plan, origin: Origin, declined: Sequence[Decline] = ()) -> dict[str, Any]:
    """What the report says of the layers, and of those that stay as they are.

    Args:
        declined: what was, when the program was quantized.
    """
    layers = origin.hub.layers
    stays = [name for name in layers if name not in plan.schemes]
    reasons = {name: layers[name].stays or layers[name].refusal for name in stays}
    kinds = {name: _kind(layer) for name, layer in layers.items()}
    coverage = {}
    for kind in KINDS:
        found = [name for name in layers if kinds[name] == kind]
        if found:
            coverage[kind] = sum(name in plan.schemes for name in found), len(found)
    return {
        "quantized": {name: describe(scheme) for name, scheme in plan.schemes.items()},
        "unquantized": {name: kinds[name] for name in stays},
        "reasons": {name: reason for name, reason in reasons.items() if reason},
        "coverage": coverage,
        "declined": [*declined, *(Decline(HUB, reason, name, ()) for name, reason in reasons.items() if reason)],
    }


def _kind(layer: Layer) -> str:
    """What graphs call the layer, and the class of one that is no linear layer there."""
    if any(part.expert is not None for part in layer.parts):
        return "experts"
    name = layer.module_class.rpartition(".")[2]
    if layer.stays and re.fullmatch(r"Conv(Transpose)?[123]d", name):
        return "transposed_convolution" if "Transpose" in name else "convolution"
    return name if layer.stays else "linear"


def _check_edited(edited: Mapping[str, torch.Tensor], origin: Origin) -> None:
    """Raise `CheckpointError` for a parameter that smoothing changed and that the source has not, or not alone."""
    for name, tensor in edited.items():
        stored = origin.stored.get(name)
        if stored is None or stored.shape != tuple(tensor.shape) or name in origin.hub.dropped:
            held = "no tensor of that name" if stored is None else f"{stored.where} {list(stored.shape)}"
            raise CheckpointError(
                f"smoothing changed {name} {list(tensor.shape)} in the program, and the source has {held}: the"
                " checkpoint could not hold it; leave out the step that smooths"
            )


def _kv_scales(job: Job, weights: ProgramWeights) -> dict[str, KvScales]:
    """Name of an attention on the hub -> its scales, of those that have a key/value cache."""
    attentions, notices = job.origin.hub.attentions, job.plan.notices
    if weights.fused:
        notices.append(unwritten_notice("q_bmm_quantizer and softmax_bmm_quantizer"))
    if strange := [path for path in weights.kv_scales if path not in attentions]:
        raise CheckpointError(f"the program quantizes the attention {strange[0]}, and the source has none of that name")
    found = {path: scales for path, scales in weights.kv_scales.items() if attentions[path].cached}
    refuse_latent(found, job.origin.hub)
    if len(found) < len(weights.kv_scales):
        count = len(weights.kv_scales) - len(found)
        notices.append(f"the scales of k and v of {count} attentions are not written: they keep no keys and values")
    notices += uncovered(found, job.origin.hub)
    return {attentions[path].name: scales for path, scales in found.items()}
