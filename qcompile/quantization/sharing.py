"""Calibration of which others see parts: what all have to agree in, and what a part keeps for whoever joins them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from passes.quantize.insert import misfit
from qcompile.algorithms.max import Max
from qcompile.algorithms.ranks import ranks
from qcompile.algorithms.scales import is_calibrated
from qcompile.algorithms.settings import MaxSettings
from qcompile.algorithms.share import Share
from qcompile.capture.batches import batch_count
from qcompile.errors import CalibrationError
from qcompile.quantization.fingerprint import Fingerprint
from qcompile.quantization.kept import Kept, has_statistics, keep, wants_statistics
from qcompile.quantization.plan import Plan, Work
from qcompile.quantization.seen import Observation
from qcompile.quantization.view import graph_view
from qcompile.recipe import format_of

_ANY = (torch.float32, torch.float32)  # what the result will compute in is not known


def observation_of(
    gm: GraphModule,
    program: ExportedProgram,
    plan: Plan,
    batches: Iterable[Any],
    dtypes: tuple[torch.dtype, torch.dtype],
    again: bool,
    progress: bool,
    share: Share,
) -> Observation:
    """The observation of a share. Raises JoinedError where those that share were given different things."""

    def facts() -> dict[str, Hashable]:
        own = Fingerprint.of(program, plan)
        return {"models": own.model, "recipes": own.recipe, "numbers of batches": batch_count(batches)}

    share.agree(facts)
    return Observation(gm, program, batches, dtypes, again=again, progress=progress, share=share)


def kept_statistics(
    work: Work, plan: Plan, program: ExportedProgram, batches: Iterable[Any], progress: bool, share: Share | None
) -> tuple[dict[str, torch.Tensor], Observation] | None:
    """What the steps of `plan` watch; None where that is largest magnitudes alone, as ranges have them."""
    static = {s for s, c in plan.configs.items() if s.operand not in ("weight", "softmax") and is_calibrated(c)}
    sites = {site: config for site, config in plan.configs.items() if site.operand == "weight" or site in static}
    whole = {site: config for site, config in sites.items() if not misfit(site.tensor, format_of(config))}
    view = graph_view(work.gm, whole, torch.float32, plan.configs)
    steps = (*plan.steps, Max(MaxSettings(power_of_two=plan.power_of_two)))
    if not wants_statistics(steps, view):
        return None
    observation = observation_of(work.gm, program, plan, batches, _ANY, True, progress, share or ranks())
    return keep(steps, view, observation), observation


def kept_of(state: Mapping[str, torch.Tensor], plan: Plan, program: ExportedProgram | None) -> Kept | None:
    """The statistics in a state, if it has some. Raises CalibrationError for those of another model or recipe."""
    if not has_statistics(state):
        return None
    known = Fingerprint.read(state)
    if program is None or known is None:
        raise CalibrationError("a state with statistics is for quantize: calibrate for ranges alone, with no shards")
    if (what := Fingerprint.of(program, plan).other(known)) is not None:
        raise CalibrationError(f"the calibrated state was made with another {what}, and holds statistics of that")
    return Kept(state, plan.steps)
