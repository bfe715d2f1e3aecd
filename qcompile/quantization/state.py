"""What `qcompile.calibrate` returned: ranges by the names of quantizers, instead of data to find them with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeGuard

import torch
from torch.fx import GraphModule, Node

from passes.graph import name_in_module
from passes.legalize.masked_rows import masked_attentions
from passes.quantize.sites import Site
from passes.subgraphs import graphs
from qcompile.errors import CalibrationError
from qcompile.messages import some

# Why an activation has no range.
NEVER_OR_ZEROS = "calibration never reached it, or it was zero in all of calibration"
ABSENT = "the calibrated state has no range for it"

_FULLY_MASKED = "fully_masked"  # what a state calls a mask that hid every key from some query, below the module's path
_STATE = ("_quantizer", _FULLY_MASKED)
ABOUT = "@"  # begins the names of what a state says of itself, which no module's path does


def largest_by_name(amax: Mapping[Site, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name of a quantizer -> the largest of `amax` where its layer is called."""
    found: dict[str, torch.Tensor] = {}
    for site, value in amax.items():
        found[site.name] = torch.maximum(found.get(site.name, value), value)
    return found


def is_state(calibration: object) -> TypeGuard[Mapping[str, torch.Tensor]]:
    """Whether `calibration` is what `qcompile.calibrate` returned, not data to calibrate with."""
    return isinstance(calibration, Mapping) and all(
        str(name).endswith(_STATE) or str(name).startswith(ABOUT) for name in calibration
    )


def known_amax(
    static: Collection[Site], state: Mapping[str, torch.Tensor]
) -> tuple[dict[Site, torch.Tensor], dict[Site, str]]:
    """The largest magnitude of each of `static`, activations with a constant scale, from what `qcompile.calibrate`
    returned; and of which it is not known, with the reason.

    Raises:
        CalibrationError: names the quantizers if `state` lacks all of a kind, or one whose range is no finite number.
    """
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
