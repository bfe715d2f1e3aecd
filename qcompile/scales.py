"""Scales of weights and of calibrated activations, with a check that each tensor has a usable range."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from passes.constants import ConstantRows, is_constant_expression
from passes.formats import FP8_1X128, FP8_128X128, FP8_PER_TOKEN, INT8_PER_TOKEN, Format, get_format
from passes.quantize.sites import Site
from qcompile.calibrate import observe_amax
from qcompile.errors import CalibrationError
from qcompile.messages import some
from qcompile.recipe import QuantizerConfig

# What one name in a recipe is in the IR, by granularity and block shape; a format whose name says it all is not here.
_FORMATS = {
    ("fp8", "per_token", None): FP8_PER_TOKEN,
    ("int8", "per_token", None): INT8_PER_TOKEN,
    ("fp8", "per_block", (1, 128)): FP8_1X128,
    ("fp8", "per_block", (128, 128)): FP8_128X128,
}


def weight_amax(gm: GraphModule, configs: Mapping[Site, QuantizerConfig]) -> dict[Site, torch.Tensor]:
    """Largest magnitude of each quantized weight, per tensor, or per channel as `[N, 1]` (experts `[E, N, 1]`).

    Weights with one (global) scale whose layers belong to one module and read the same tensor (q, k, v; gate, up) share
    the largest, so that they can be merged and any server can load them as one.
    """
    amax: dict[Site, torch.Tensor] = {}
    groups: dict[tuple[Node, str, str], list[Site]] = defaultdict(list)
    for site, config in configs.items():
        if site.operand != "weight":
            continue
        amax[site] = _amax(gm, site.tensor, per_row=config.granularity == "per_channel")
        if not bool(torch.isfinite(amax[site]).all()):  # aminmax carries a NaN on
            raise CalibrationError(f"{site.name}: the weight holds NaN or infinity")
        if config.granularity != "per_channel" and has_constant(config):
            source = site.consumer.args[0]
            assert isinstance(source, Node)
            groups[source, site.module.rpartition(".")[0], config.format].append(site)
    for group in groups.values():
        shared = torch.stack([amax[site] for site in group]).amax()
        amax.update(dict.fromkeys(group, shared))
    return amax


def _amax(gm: GraphModule, weight: Node, *, per_row: bool) -> torch.Tensor:
    """Largest magnitude in each row `[..., N, 1]`, or in the whole of a weight; fp32."""
    parts = []
    for _, values in ConstantRows(gm, weight):
        low, high = torch.aminmax(values, dim=-1, keepdim=True) if per_row else torch.aminmax(values)
        parts.append(torch.maximum(-low, high).float())
    return torch.cat(parts) if per_row else torch.stack(parts).amax()


def activation_amax(
    gm: GraphModule,
    program: ExportedProgram,
    configs: Mapping[Site, QuantizerConfig],
    calibration: Iterable[Any] | Mapping[str, torch.Tensor] | None,
    progress: bool,
) -> dict[Site, torch.Tensor]:
    """Calibrated largest magnitude of each tensor that is quantized with a constant, if only global, scale."""
    static = static_sites(configs)
    if not static:
        return {}
    if is_state(calibration):
        return known_amax(configs, calibration)
    constants = [site for site in static if is_constant_expression(site.tensor)]
    if constants:
        name = constants[0].name
        raise CalibrationError(
            f"{name}: the input is a constant, which no calibration can change; leave the layer out by a rule such as"
            f' {{quantizer: "{name.rpartition(".")[0]}.*", enable: false}}'
        )
    if calibration is None:
        raise CalibrationError(
            f"the recipe gives static scales to {some([site.name for site in static])}, which need calibration data:"
            " pass calibration=batches, or use a recipe with dynamic activations such as fp8_per_channel_per_token"
        )
    observed = observe_amax(gm, program, {s.tensor: s.name for s in static}, calibration, progress=progress)
    return {site: observed[site.tensor] for site in static}


def static_sites(configs: Mapping[Site, QuantizerConfig]) -> list[Site]:
    """The activations with a constant scale, if only a global one, that calibration has to find."""
    return [s for s, config in configs.items() if s.operand not in ("weight", "softmax") and has_constant(config)]


def is_state(calibration: object) -> TypeGuard[Mapping[str, torch.Tensor]]:
    """Whether `calibration` is what `qcompile.calibrate` returned, not data to calibrate with."""
    return isinstance(calibration, Mapping) and all(str(name).endswith("_quantizer") for name in calibration)


def known_amax(configs: Mapping[Site, QuantizerConfig], state: Mapping[str, torch.Tensor]) -> dict[Site, torch.Tensor]:
    """The largest magnitude of each activation with a constant scale, from what `qcompile.calibrate` returned.

    Raises:
        CalibrationError: names the quantizers that `state` lacks, or one whose range is no finite number.
    """
    static = static_sites(configs)
    if missing := [site.name for site in static if site.name not in state]:
        raise CalibrationError(
            f"the calibrated state has no range for {some(missing)}; calibrate with the same recipe and module names"
        )
    for site in static:
        amax = state[site.name]
        if amax.numel() != 1 or not bool(torch.isfinite(amax).all()) or float(amax) < 0:
            raise CalibrationError(f"{site.name}: the calibrated state holds {amax}, which is no range")
    return {site: state[site.name].detach().float().reshape(()).cpu() for site in static}


def has_constant(config: QuantizerConfig) -> bool:
    """Whether the quantizer has a constant scale: NVFP4 has a global one above those of its blocks."""
    fmt = format_of(config)
    return fmt.scale is not None or not (config.dynamic or fmt.sizes)


def format_of(config: QuantizerConfig) -> Format:
    """The format that the IR carries `config` out with."""
    return _FORMATS.get((config.format, config.granularity, config.block_shape)) or get_format(config.format)


def scale_of(amax: torch.Tensor, config: QuantizerConfig, power_of_two: bool) -> torch.Tensor:
    """amax / max, in float32; 1 where a tensor is all zeros, so that its codes are zeros.

    For a format of two levels the global scale, with which the scale of the block of the largest magnitude is e4m3's
    largest: amax / (6 * 448) for NVFP4, as Model Optimizer has it.
    """
    scale = amax / get_format(config.format).global_max
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    # of numbers that small, too: what divides by the scale, as files of compressed-tensors do, must not be infinite
    return torch.where(scale >= torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
