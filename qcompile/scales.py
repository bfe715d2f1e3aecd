"""Scales of weights and of calibrated activations, with a check that each tensor has a usable range."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from passes.constants import ConstantRows
from passes.formats import get_format
from passes.graph import name_in_module
from passes.legalize.masked_rows import masked_attentions
from passes.legalize.ranges import beyond
from passes.quantize.sites import Site
from passes.subgraphs import graphs, owner
from qcompile.batch_forms import calibration_form
from qcompile.errors import CalibrationError
from qcompile.headroom import Headroom, Watch
from qcompile.messages import some
from qcompile.observe import observe
from qcompile.process import alone
from qcompile.recipe import QuantizerConfig, format_of

# Why an activation has no range.
NEVER = "calibration never reached it"
ZEROS = "it was zero in all of calibration"
NEVER_OR_ZEROS = "calibration never reached it, or it was zero in all of calibration"
ABSENT = "the calibrated state has no range for it"

_FULLY_MASKED = "fully_masked"  # what a state calls a mask that hid every key from some query, below the module's path
_STATE = ("_quantizer", _FULLY_MASKED)


def weight_amax(configs: Mapping[Site, QuantizerConfig]) -> dict[Site, torch.Tensor]:
    """Largest magnitude of each quantized weight, per tensor, or per channel as `[N, 1]` (experts `[E, N, 1]`).

    Weights with one (global) scale whose layers belong to one module and read the same tensor (q, k, v; gate, up) share
    the largest, so that they can be merged and any server can load them as one.
    """
    amax: dict[Site, torch.Tensor] = {}
    groups: dict[tuple[Node, str, str], list[Site]] = defaultdict(list)
    for site, config in configs.items():
        if site.operand != "weight":
            continue
        amax[site] = _amax(site.tensor, per_row=config.granularity == "per_channel")
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


def _amax(weight: Node, *, per_row: bool) -> torch.Tensor:
    """Largest magnitude in each row `[..., N, 1]`, or in the whole of a weight; fp32."""
    parts = []
    for _, values in ConstantRows(owner(weight), weight):
        low, high = torch.aminmax(values, dim=-1, keepdim=True) if per_row else torch.aminmax(values)
        parts.append(torch.maximum(-low, high).float())
    return torch.cat(parts) if per_row else torch.stack(parts).amax()


@dataclass(frozen=True)
class Ranges:
    """What calibration found.

    Attributes:
        amax: largest magnitude of each tensor that is quantized with a constant, if only global, scale.
        unreached: of these tensors, those that have no range -> why.
        headroom: how near the tensors came to the end of the compute dtype; empty without data.
        notices: what the user should know of the data, or of the lack of it.
        fully_masked: the attentions whose mask hid every key from some query.
        source: what they were found on, for metadata.
    """

    amax: dict[Site, torch.Tensor]
    unreached: dict[Site, str] = field(default_factory=dict)
    headroom: list[Headroom] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    fully_masked: set[Node] = field(default_factory=set)
    source: str = ""


def activation_ranges(
    gm: GraphModule,
    program: ExportedProgram | None,
    configs: Mapping[Site, QuantizerConfig],
    calibration: Iterable[Any] | Mapping[str, torch.Tensor] | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    progress: bool,
) -> Ranges:
    """Calibrate what `configs` gives constant scales to, and see what of the graph leaves the compute dtype.

    Args:
        dtypes: that of the model, and that of the program.

    Raises:
        CalibrationError: data is missing or does not fit, a tensor has no finite range, or one leaves the compute
            dtype.
    """
    static = static_sites(configs)
    if is_state(calibration):
        return _known_ranges(gm, configs, calibration, dtypes)
    assert program is not None
    source, target = dtypes
    if calibration is None:
        if static:
            raise CalibrationError(
                f"the recipe gives static scales to {some([s.name for s in static])}, which need calibration data: use"
                " a recipe with dynamic activations such as fp8_per_channel_per_token, or give batches in the form of"
                f" the example inputs, many of them in the place of this one:\n  {calibration_form(program)}"
            )
        return Ranges({}, notices=_unknown_ranges(source, target))
    with alone():
        watch = Watch(gm, source, target)
    seen = {site: watch.quantizer(site.tensor) for site in static}
    if not watch.watched:
        return Ranges(
            {}, notices=[f"calibration data is not used: the recipe needs none, and no range ends in {target}"]
        )
    log = observe(watch.gm, program, watch.watched, calibration, widen=watch.converted, progress=progress)
    notices = log.notices()
    if not watch.statistics:
        notices = [
            "calibration data is used to see what masks hide, and for nothing else: the recipe needs none, and no range"
            f" ends in {target}"
        ]
    for site, largest in seen.items():
        if not bool(torch.isfinite(largest.value)):
            raise CalibrationError(f"{site.name}: calibration found {float(largest.value)} in {site.tensor.name}")
    amax = {site: largest.value for site, largest in seen.items()}
    of_layer = largest_by_name(amax)  # a layer in two branches, of which one was taken, has a range in the other, too
    amax = {site: value if float(value) else of_layer[site.name] for site, value in amax.items()}
    unreached = {site: NEVER if not seen[site].reached else ZEROS for site, value in amax.items() if not float(value)}
    found = f"{log.samples} sample{'s' * (log.samples != 1)}"
    return Ranges(amax, unreached, watch.headroom(), [*watch.check(), *notices], watch.fully_masked, found)


def largest_by_name(amax: Mapping[Site, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name of a quantizer -> the largest of `amax` where its layer is called."""
    found: dict[str, torch.Tensor] = {}
    for site, value in amax.items():
        found[site.name] = torch.maximum(found.get(site.name, value), value)
    return found


def _known_ranges(
    gm: GraphModule,
    configs: Mapping[Site, QuantizerConfig],
    state: Mapping[str, torch.Tensor],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Ranges:
    """The ranges of what `qcompile.calibrate` returned."""
    amax, unreached = known_amax(configs, state)
    source, target = dtypes
    limit = torch.finfo(target).max
    if source != target and (over := [f"{s.name} ({float(a):.3g})" for s, a in amax.items() if float(a) > limit]):
        raise CalibrationError(f"the calibrated state holds larger ranges in {some(over)}, and {beyond(target)}")
    notices = _unknown_ranges(source, target)
    return Ranges(amax, unreached, notices=notices, fully_masked=known_masks(gm, state), source="given ranges")


def _unknown_ranges(source: torch.dtype, target: torch.dtype) -> list[str]:
    if target is not torch.float16 or source is target:
        return []
    return [
        f"no calibration data: whether every tensor stays below {torch.finfo(target).max:.5g}, where {target} ends, is"
        " not known"
    ]


def static_sites(configs: Mapping[Site, QuantizerConfig]) -> list[Site]:
    """The activations with a constant scale, if only a global one, that calibration has to find."""
    return [s for s, config in configs.items() if s.operand not in ("weight", "softmax") and is_calibrated(config)]


def is_state(calibration: object) -> TypeGuard[Mapping[str, torch.Tensor]]:
    """Whether `calibration` is what `qcompile.calibrate` returned, not data to calibrate with."""
    return isinstance(calibration, Mapping) and all(str(name).endswith(_STATE) for name in calibration)


def known_amax(
    configs: Mapping[Site, QuantizerConfig], state: Mapping[str, torch.Tensor]
) -> tuple[dict[Site, torch.Tensor], dict[Site, str]]:
    """The largest magnitude of each activation with a constant scale, from what `qcompile.calibrate` returned; and of
    which it is not known, with the reason.

    Raises:
        CalibrationError: names the quantizers if `state` lacks all of a kind, or one whose range is no finite number.
    """
    static = static_sites(configs)
    missing = [site for site in static if site.name not in state]
    kinds = {str(name).rpartition(".")[2] for name in state}
    if missing and (len(missing) == len(static) or any(site.suffix not in kinds for site in missing)):
        raise CalibrationError(
            f"the calibrated state has no range for {some([site.name for site in missing])}: calibrate with the same"
            " recipe and module names"
        )
    amax: dict[Site, torch.Tensor] = {}
    for site in static:
        value = state.get(site.name, torch.zeros(()))
        if value.numel() != 1 or not bool(torch.isfinite(value).all()) or float(value) < 0:
            raise CalibrationError(f"{site.name}: the calibrated state holds {value}, which is no range")
        amax[site] = value.detach().float().reshape(()).cpu()
    unreached = {site: ABSENT if site in missing else NEVER_OR_ZEROS for site in static if not float(amax[site])}
    return amax, unreached


def mask_state(attentions: Iterable[Node]) -> dict[str, torch.Tensor]:
    """What a state keeps of the attentions whose mask hid every key from some query."""
    return {name_in_module(node, _FULLY_MASKED): torch.tensor(True) for node in attentions}


def known_masks(gm: GraphModule, state: Mapping[str, torch.Tensor]) -> set[Node]:
    """The attentions of a normalized graph of which what `qcompile.calibrate` returned says that."""
    names = {name for name, value in state.items() if name.endswith(_FULLY_MASKED) and torch.as_tensor(value).any()}
    return {
        node
        for part in graphs(gm)
        for node, _ in masked_attentions(part)
        if name_in_module(node, _FULLY_MASKED) in names
    }


def has_constant(config: QuantizerConfig) -> bool:
    """Whether the quantizer has a constant scale: NVFP4 has a global one above those of its blocks."""
    fmt = format_of(config)
    return fmt.scale is not None or not (config.dynamic or fmt.sizes)


def is_calibrated(config: QuantizerConfig) -> bool:
    """Whether the constant scale of an activation is that of what calibration sees."""
    return has_constant(config) and config.constant_amax is None


def scale_of(amax: torch.Tensor, config: QuantizerConfig, power_of_two: bool) -> torch.Tensor:
    """amax / max, in float32, its smallest normal number at least; 1 where a tensor is all zeros, and so are its codes.

    For a format of two levels the global scale, with which the scale of the block of the largest magnitude is e4m3's
    largest: amax / (6 * 448) for NVFP4, as Model Optimizer has it.
    """
    scale = amax / get_format(config.format).global_max
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    # below it what divides by the scale, as files of compressed-tensors do, would be infinite
    return torch.where(amax == 0, 1.0, scale.clamp_min(torch.finfo(torch.float32).tiny))
