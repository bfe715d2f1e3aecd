"""Adapters of peft in a model of transformers: merged by peft's own code, on copies of their layers."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

from qcompile.errors import CheckpointError
from qcompile.messages import first_line, some

MERGE = (
    "merge it first: model = model.merge_and_unload() for a PeftModel; for model.add_adapter(...), save the adapter,"
    " load it with peft.PeftModel.from_pretrained(base model, directory), and merge that"
)


def is_adapter(module: torch.nn.Module) -> bool:
    """Whether peft has put `module` in the place of another."""
    if "peft" not in sys.modules:  # who has such a model has imported it
        return False
    homes = sys.modules["peft.utils.other"], sys.modules["peft.tuners.tuners_utils"]
    kinds = (getattr(home, name, None) for home in homes for name in _KINDS)
    return any(kind is not None and isinstance(module, kind) for kind in kinds)


_KINDS = ("AuxiliaryTrainingWrapper", "BaseTunerLayer")


def merged(path: str, layer: Any) -> torch.nn.Module:
    """The module that merge_and_unload would put in the place of `layer`, which is not changed.

    Raises:
        CheckpointError: the adapter is switched off, or peft cannot merge it.
    """
    if getattr(layer, "disable_adapters", False):
        raise CheckpointError(
            f"{path}: the adapter is disabled, so what the model computes is not what merging it would give:"
            " model.enable_adapters() to have it, or model.unload() of a PeftModel to be rid of it"
        )
    try:
        with torch.no_grad():
            mine = copy.deepcopy(layer)
            # the two ways of peft's `merge_and_unload`
            if hasattr(mine, "unload_and_optionally_merge_module"):
                found = mine.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            else:
                mine.merge(safe_merge=False, adapter_names=None)
                found = mine.get_base_layer()
    except Exception as error:  # whatever a kind of adapter has against it
        raise CheckpointError(
            f"{path} has an adapter that peft cannot merge ({type(layer).__name__}: {first_line(error)}): {MERGE}"
        ) from error
    assert isinstance(found, torch.nn.Module)
    return found


def adapter_notice(layers: list[tuple[str, Any]]) -> str:
    """What became of the adapters."""
    active = sorted({name for _, layer in layers for name in getattr(layer, "active_adapters", [])})
    given = {
        name
        for _, layer in layers
        for kind in (*getattr(layer, "adapter_layer_names", ()), "modules_to_save")
        if isinstance(held := getattr(layer, kind, None), torch.nn.Module)
        for name, _ in held.named_children()
    }
    left = sorted(given - set(active))
    idle = f"; {', '.join(left)}: not active, left out" if left else ""
    return f"the adapter {', '.join(active)} is merged into {some([path for path, _ in layers])}{idle}"
