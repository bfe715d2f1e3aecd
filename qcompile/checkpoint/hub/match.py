"""Matches the modules of a transformers model with the tensors of its checkpoint.

Only names and shapes are looked at, so the model can be on the meta device.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from qcompile.checkpoint.files.tensors import Shaped
from qcompile.checkpoint.hub.layout import Hub
from qcompile.checkpoint.hub.modules import Held, Modules, class_name
from qcompile.checkpoint.hub.names import HubNames, Place
from qcompile.compat.transformers import may_lack as may_lack_of
from qcompile.errors import CheckpointError


def read_hub(model: Any, stored: Mapping[str, Shaped], where: str) -> Hub:
    """Match the modules of `model` with the tensors of its checkpoint.

    Args:
        model: a PreTrainedModel.
        stored: the tensors, by their names on the hub.
        where: what to call the checkpoint in messages.

    Raises:
        CheckpointError: a parameter is in no file, or has another shape there.
    """
    hub = Hub()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ties = {target: source for target, source in model.all_tied_weights_keys.items() if target in parameters}
    held: Held = defaultdict(list)
    names = HubNames(model)
    for key in stored:
        place = names.place(key)
        if place is None:
            hub.unknown.append(key)
        else:
            held[place.path].append((key, place))
    _tie(ties, held, hub)
    may_lack = may_lack_of(model)
    for name, parameter in parameters.items():
        if name not in held and name not in ties and not any(re.search(pattern, name) for pattern in may_lack):
            raise CheckpointError(
                f"{where} lacks {name}, which {type(model).__name__} needs; name the class that was saved in"
                ' config.json ("architectures")'
            )
        _check_shape(name, parameter, held.get(name, []), stored)
    reader = Modules(held, ties, stored, caches=bool(model.can_generate()))
    for path, module in model.named_modules():
        if (attention := reader.attention(path, module)) is not None:
            hub.attentions[path] = attention
        if reader.is_norm(module):
            hub.norms[path] = class_name(module)
        else:
            hub.layers.update((layer.name, layer) for layer in reader.layers(path, module))
    return hub


def _tie(ties: Mapping[str, str], held: Held, hub: Hub) -> None:
    """Leave one name to each weight; a checkpoint may have it under either, or both."""
    for target, source in ties.items():
        other = target
        if source not in held and target in held:
            held[source], other = held.pop(target), source
        dropped = [key for key, _ in held.pop(target, [])]
        hub.dropped.update(dropped)
        if source in held:
            kept = held[source][0][0]
            hub.tied[(dropped or [other])[0].removesuffix(".weight")] = kept.removesuffix(".weight")


def _check_shape(
    name: str, parameter: torch.Tensor, held: list[tuple[str, Place]], stored: Mapping[str, Shaped]
) -> None:
    wanted = tuple(parameter.shape)
    for key, place in held:
        tensor = stored[key]
        good = tensor.shape == wanted if place.expert is None else tensor.shape[1:] == wanted[2:]
        if place.reason is None and not good:
            raise CheckpointError(
                f"{tensor.where} is {list(tensor.shape)}, and the model that config.json describes has"
                f" {list(wanted)} for {name}"
            )
