"""The tensors of a model in memory under the names of its architecture, whatever was put around them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from qcompile.checkpoint.hub.adapters import MERGE, adapter_notice, is_adapter, merged
from qcompile.checkpoint.hub.computed import computed_tensors, strange_hooks
from qcompile.checkpoint.hub.wrappers import inside, local
from qcompile.compat.transformers import may_lack as may_lack_of
from qcompile.errors import CheckpointError
from qcompile.messages import some


@dataclass
class PlainState:
    """What a model holds.

    Attributes:
        tensors: by the names of the architecture; those of the model itself where they are stored as they are.
        notices: what was merged or computed, and what no checkpoint says.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def plain_state(model: Any, architecture: Any) -> PlainState:
    """The state of `model` as `architecture` has it, without changing the model.

    Wrappers around parts are taken off. Adapters are merged as peft does it; weights that are computed (normed, pruned,
    parametrized) are written as values, unless the architecture itself computes them, as Wav2Vec2 does.

    Args:
        architecture: a model of the same class and configuration, on the meta device.

    Raises:
        CheckpointError: names the module of what no checkpoint can say: a tensor that the architecture does not have;
            one that is on no device, or sharded; tied weights that differ.
    """
    reader = _Reader(architecture.state_dict())
    reader.read(model, "")
    _check(reader.tensors, reader.own, architecture)
    plain = PlainState(reader.tensors)
    if reader.adapted:
        plain.notices.append(adapter_notice(reader.adapted))
    if reader.computed:
        plain.notices.append(f"{some(reader.computed)}: written as computed, without what it is computed of")
    if hooked := strange_hooks(model):
        plain.notices.append(f"forward hooks of {some(hooked)} are in no checkpoint: it holds the weights as they are")
    return plain


class _Reader:
    """Collects tensors module by module.

    Attributes:
        own: those of the architecture.
        tensors, adapted, computed: what was found.
    """

    def __init__(self, own: Mapping[str, torch.Tensor]) -> None:
        self.own = own
        self.tensors: dict[str, torch.Tensor] = {}
        self.adapted: list[tuple[str, Any]] = []
        self.computed: list[str] = []

    def read(self, module: Any, path: str) -> None:
        """The tensors of `module`, which the architecture calls `path`, and of all in it."""
        if (found := inside(module)) is not None:
            return self.read(found[1], path)
        if is_adapter(module):
            self.adapted.append((path, module))
            return self.read(merged(path, module), path)
        dot = f"{path}." if path else ""
        held: dict[str, torch.Tensor] = {}
        module._save_to_state_dict(held, dot, keep_vars=False)
        self.tensors.update((key, local(key, tensor)) for key, tensor in held.items())
        for name, child in module.named_children():
            self.read(child, f"{dot}{name}")
        for computed in computed_tensors(path, module):
            parts = tuple(f"{dot}{part}" for part in computed.parts)
            if not any(key.startswith(parts) for key in self.own):
                for key in [key for key in self.tensors if key.startswith(parts)]:
                    del self.tensors[key]
                self.tensors[f"{dot}{computed.name}"] = computed.value
                self.computed.append(f"{dot}{computed.name}")


def _check(tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], architecture: Any) -> None:
    """Refuse what has no values, and what readers would leave out."""
    name, tied = type(architecture).__name__, architecture.all_tied_weights_keys
    if nowhere := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise CheckpointError(f"{name}: {nowhere[0]} is on the meta device and has no values")
    if foreign := [key for key in tensors if key not in own]:
        raise CheckpointError(
            f"{some(sorted({key.rpartition('.')[0] or key for key in foreign}))}: {name}, as its"
            f" configuration describes it, has no {foreign[0]}, and readers would leave it out: {_way_out(foreign[0])}"
        )
    may_lack = may_lack_of(architecture)
    for key, wanted in own.items():
        tensor = tensors.get(key)
        if tensor is None and key not in tied and not any(re.search(pattern, key) for pattern in may_lack):
            raise CheckpointError(
                f"{key}: {name}, as its configuration describes it, has this tensor, and the model in memory has not:"
                " put back what was taken out or is made by a hook, or change the configuration with it"
            )
        if tensor is not None and tensor.shape != wanted.shape:
            raise CheckpointError(
                f"{key} is {list(tensor.shape)}, and {name} has {list(wanted.shape)}, as its configuration describes"
                " it: change model.config as the model was changed"
            )
    for target, source in tied.items():
        one, other = tensors.get(target), tensors.get(source)
        if one is not None and other is not None and not _same(one, other):
            raise CheckpointError(
                f"{target} is not {source}, to which the configuration ties it: set model.config.tie_word_embeddings ="
                " False to have both"
            )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or (a.device == b.device and torch.equal(a, b))


def _way_out(key: str) -> str:
    if any(word in key for word in ("lora_", "base_layer.", "adapter", "modules_to_save.")):
        return f"it is of an adapter; {MERGE}"
    if "parametrizations." in key:
        return "torch.nn.utils.parametrize.remove_parametrizations(module, name) writes it into the weight"
    if key.endswith(("_orig", "_mask", "_g", "_v", "_u")):
        return "write it into the weight, with torch.nn.utils.prune.remove, remove_weight_norm or its like"
    return "take it out of the model, or save a model of a class that has it"
