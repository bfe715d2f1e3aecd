"""Weights that a module computes of others: by parametrizations, and by the hooks that came before them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from qcompile.errors import CheckpointError
from qcompile.messages import first_line


@dataclass(frozen=True)
class Computed:
    """A tensor that is not in the state of its module.

    Attributes:
        name: in the module; `weight`.
        parts: names, or beginnings of names, of what it is computed of.
        value: what an evaluating model computes.
    """

    name: str
    parts: tuple[str, ...]
    value: torch.Tensor


def computed_tensors(path: str, module: Any) -> Iterator[Computed]:
    """Those of the module itself, which is not changed. Raises `CheckpointError` for one that cannot be computed."""
    try:
        with torch.no_grad():
            yield from _computed(module)
    except Exception as error:  # a parametrization can be anybody's code
        raise CheckpointError(
            f"{path}: its weight is computed of other tensors, and that fails here: {first_line(error)}; write it into"
            " the module first, with torch.nn.utils.parametrize.remove_parametrizations or its like"
        ) from error


def _computed(module: Any) -> Iterator[Computed]:
    if is_parametrized(module):
        for tensor, steps in module.parametrizations.items():
            # a copy, as a spectral norm in training mode takes a step of its power iteration
            yield Computed(tensor, (f"parametrizations.{tensor}.",), copy.deepcopy(steps).eval()())
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield Computed(hook.name, (f"{hook.name}_g", f"{hook.name}_v"), hook.compute_weight(module))
        elif isinstance(hook, SpectralNorm):
            value = hook.compute_weight(module, do_power_iteration=False)
            yield Computed(hook.name, tuple(f"{hook.name}_{part}" for part in ("orig", "u", "v")), value)
        elif isinstance(hook, BasePruningMethod):
            pruned: Any = hook
            name = pruned._tensor_name
            yield Computed(name, (f"{name}_orig", f"{name}_mask"), pruned.apply_mask(module))


_KNOWN = (WeightNorm, SpectralNorm, BasePruningMethod)
_HARMLESS = ("torch.", "transformers.", "accelerate.", "peft.")


def strange_hooks(model: torch.nn.Module) -> list[str]:
    """Paths of the modules with forward hooks that are not from the libraries around a model."""
    found = []
    for path, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if any(not isinstance(hook, _KNOWN) and not _origin(hook).startswith(_HARMLESS) for hook in hooks):
            found.append(path or "the model")
    return found


def _origin(hook: Any) -> str:
    while hasattr(hook, "func"):  # functools.partial
        hook = hook.func
    return f"{getattr(hook, '__module__', None) or type(hook).__module__}."
