"""The one plan-and-run: from a captured program, or a graph of Dynamo's, to one with codes.

    capture -> plan (`plan.py`) -> scales -> `carry_out` -> program, with a record for the reports

`quantize`, `calibrate`, `import_quantized` and the back end of torch.compile differ in where the graph and the ranges
of its activations come from, and in nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from passes.base import PassLog
from passes.carried import state_names
from passes.dependence import input_dependence
from passes.errors import PassError
from passes.graph import val
from passes.pipelines import quantize_pipeline
from passes.places import OwnPasses
from passes.program import lift, unlift
from passes.quantize.insert import Quantizer
from passes.quantize.sites import Site
from qcompile.algorithms.base import told
from qcompile.algorithms.share import Share
from qcompile.capture.dimensions import noted_dimensions
from qcompile.frontends.quantized import is_finished
from qcompile.messages import some
from qcompile.process import alone
from qcompile.quantization.dtypes import compute_dtype, model_dtype
from qcompile.quantization.fingerprint import Fingerprint
from qcompile.quantization.plan import Plan, Planner, Work
from qcompile.quantization.shards import Shard
from qcompile.quantization.sharing import kept_statistics
from qcompile.quantization.solve import Calibration, Data, Solution, solve
from qcompile.quantization.state import largest_by_name, mask_state
from qcompile.report.record import QuantizeRecord, record

logger = logging.getLogger("qcompile")


def quantized_program(
    program: ExportedProgram,
    planner: Planner,
    calibration: Calibration,
    dtype: torch.dtype | None,
    progress: bool,
    own: OwnPasses,
) -> ExportedProgram:
    """`program` with the quantizers that `planner` wants, computing in `dtype`, and a record of what was done.

    Args:
        own: passes of the user's.
    """
    with alone():
        work = Work(unlift(program), PassLog(own=own))
        needed = input_dependence(work.gm)
        plan = planner(work)
    source = model_dtype(work.gm)
    target = compute_dtype(dtype, source)
    found = solve(work, plan, Data(calibration, program, progress=progress), (source, target))
    with alone():
        carry_out(work, plan, found, source, target)
        own.check_placed()
        _check_dependence(needed, input_dependence(work.gm))
        quantized = lift(work.gm, program)
    if plan.quantizes and not is_finished(quantized):
        _tell_nothing(work.log)
    if names := state_names(program):
        work.log.notices.append(
            f"the model writes to {some(names)}: it is given to the program and given back, and calibration began with"
            " the values that it had"
        )
    notices = [*map(str, plan.notices), *told(plan.steps), *found.notices, *work.log.notices]
    seen = found.headroom, found.source, noted_dimensions(program), found.ranges
    record(quantized, QuantizeRecord(plan.name, work.log.fired, work.log.declined, notices, *seen))
    return quantized


def calibrated_state(
    program: ExportedProgram,
    planner: Planner,
    batches: Iterable[Any],
    progress: bool,
    share: Share | None = None,
    weights: bool = False,
) -> dict[str, torch.Tensor]:
    """What `qcompile.calibrate` returns: the ranges of what `planner` gives constant scales to; of a `share` of the
    batches what `merge_states` joins; and what algorithms keep for `weights`, if that is wanted."""
    with alone():
        work = Work(unlift(program))
        plan = planner(work)
    wanted, wide = plan if weights else plan.activations, weights or share is not None
    if wide and (found := kept_statistics(work, wanted, program, batches, progress, share)) is not None:
        tensors, observation = found
        assert observation.watch is not None
        notices, seen = observation.notices, observation.batches_seen
        state = tensors | mask_state(observation.watch.fully_masked) | Fingerprint.of(program, plan).tensors()
    else:
        same = (torch.float32, torch.float32)  # what the result will compute in is not known
        solution = solve(work, plan.activations, Data(batches, program, progress=progress, share=share), same)
        known = [site for site in plan.configs if site in solution.quantizers or site in solution.unreached]
        zero, quantizers = torch.zeros(()), solution.quantizers
        amax = {site: _amax(quantizers[site]) if site in quantizers else zero for site in known}
        notices, seen = solution.notices, solution.batches
        state = largest_by_name(amax) | mask_state(solution.fully_masked)
    for notice in notices:
        logger.warning("%s", notice)
    return state if share is None else state | Shard(share, seen, Fingerprint.of(program, plan)).tensors()


def quantize_graph(work: Work, planner: Planner, state: Mapping[str, torch.Tensor] | None, how: str) -> list[str]:
    """Do what `planner` wants with a graph that no program was captured of; it computes in the dtype that it has.

    Args:
        state: what `qcompile.calibrate` returned. how: what to do where there is none and one is needed.

    Returns notices for the user.
    """
    plan, dtype = planner(work), model_dtype(work.gm)
    found = solve(work, plan, Data(state, how=how), (dtype, dtype))
    carry_out(work, plan, found, dtype, dtype)
    return [*map(str, plan.notices), *told(plan.steps), *found.notices, *work.log.notices]


def carry_out(work: Work, plan: Plan, found: Solution, source: torch.dtype, target: torch.dtype) -> None:
    """Let the passes do on the graph what `plan` wants, with the scales and codes that were found.

    Args:
        source: the dtype that the model computes in. target: the one that the result computes in.
    """
    plan = plan.without(found.unreached, work.log)
    _tell_small_weights(work, plan, found.weights, target)
    known = {site: found.quantizers.get(site) or plan.uncalibrated(config) for site, config in plan.configs.items()}
    placed = {site: quantizer.to(val(site.tensor).device) for site, quantizer in known.items()}
    softmax = {s.consumer: q.scale for s, q in placed.items() if s.operand == "softmax" and q.scale is not None}
    quantizers = {site: quantizer for site, quantizer in placed.items() if site.operand != "softmax"}
    masked = found.fully_masked
    work.run(quantize_pipeline(quantizers, None if plan.fuses else softmax, source, target, masked))


def _amax(quantizer: Quantizer) -> torch.Tensor:
    """What an activation's scale is for."""
    if quantizer.amax is not None:
        return quantizer.amax
    assert quantizer.scale is not None
    return quantizer.scale.float() * quantizer.format.global_max


def _check_dependence(needed: list[set[str]], found: list[set[str]]) -> None:
    """No output may have lost an input on the way, baked into a constant or cut off by a rewrite."""
    for index, lost in enumerate(before - after for before, after in zip(needed, found, strict=True)):
        if lost:
            raise PassError(f"output {index} no longer depends on {', '.join(sorted(lost))}: a pass cut it off")


def _tell_nothing(log: PassLog) -> None:
    """A recipe that named layers, all of which were declined: the program is valid, and none of it quantized."""
    reasons = dict.fromkeys(f"{decline.module or 'the root'}: {decline.reason}" for decline in log.declined)
    told = f"nothing of this model is quantized, as everything that the recipe names was declined: {some([*reasons])}"
    log.notices.append(told)
    logger.warning("%s", told)


def _tell_small_weights(work: Work, plan: Plan, amax: Mapping[Site, torch.Tensor], target: torch.dtype) -> None:
    """A weight of which the compute dtype keeps few digits, or none, if its format does not say so by its scale."""
    least = torch.finfo(target).smallest_normal
    small = {
        site.name: float(amax[site].max()) for site in plan.configs if site in amax and 0 < amax[site].max() < least
    }
    if small:
        told = some([f"{name} ({largest:.3g})" for name, largest in small.items()])
        work.log.notices.append(
            f"the largest weight is below the normal numbers of {target} in {told}: digits are lost"
        )
