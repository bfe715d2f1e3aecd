"""Scales of weights and of calibrated activations, with a check that each tensor has a usable range."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from passes.constants import evaluate_constant, is_constant_expression
from passes.formats import get_format
from passes.quantize.sites import Site
from qcompile.calibrate import observe_amax
from qcompile.errors import CalibrationError
from qcompile.recipe import QuantizerConfig


def weight_amax(gm: GraphModule, configs: Mapping[Site, QuantizerConfig]) -> dict[Site, torch.Tensor]:
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


def activation_amax(
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


def scale_of(amax: torch.Tensor, config: QuantizerConfig, power_of_two: bool) -> torch.Tensor:
    """amax / max, in float32; 1 where a tensor is all zeros, so that its codes are zeros."""
    scale = amax / get_format(config.format).max
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return torch.where(scale > 0, scale, torch.ones_like(scale))
