"""What is put around models and their parts to train or compile them, and does not change what they compute."""

from __future__ import annotations

import re
import sys
from collections.abc import Container, Mapping
from typing import Any, TypeVar

import torch
from torch.distributed.tensor import DTensor, Replicate

from qcompile.compat.dynamo import module_inside
from qcompile.errors import CheckpointError

T = TypeVar("T")

_PARALLEL = (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)
_GATHER = (
    "gather it first: torch.distributed.checkpoint.state_dict.get_model_state_dict(model,"
    " options=StateDictOptions(full_state_dict=True, cpu_offload=True)) on every rank, load that into a model that is"
    " not sharded, and save this one"
)
# Names that wrappers put before those of the model, or in the middle of them, as files and programs have them.
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")
_AROUND = ("module.", "base_model.model.")


def inside(module: torch.nn.Module) -> tuple[str, Any] | None:
    """The name of what a wrapper is around in it, and that; None for a module that is none."""
    if isinstance(module, _PARALLEL):
        return "module", module.module
    inner = module_inside(module)
    return ("_orig_mod", inner) if isinstance(inner, torch.nn.Module) else None


def without_wrappers(model: Any) -> Any:
    """The model within DataParallel, DistributedDataParallel, torch.compile and peft's classes, in any order.

    Raises:
        CheckpointError: it is sharded, or peft's class adds what no layer of the model holds.
    """
    while True:
        if hasattr(model, "_fsdp_wrapped_module"):
            raise CheckpointError(f"{type(model).__name__}: the model is sharded: {_GATHER}")
        if (found := inside(model)) is not None:
            model = found[1]
        elif isinstance(model, _peft_models()):
            model = _base_of(model)
        else:
            return model


def _peft_models() -> tuple[type, ...]:
    peft: Any = sys.modules.get("peft")  # who has such a model has imported it
    return (peft.PeftModel, peft.PeftMixedModel) if peft is not None else ()


def _base_of(model: Any) -> Any:
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", [])
    for name in active if isinstance(active, list) else [active]:
        if getattr(configs.get(name), "is_prompt_learning", False):
            raise CheckpointError(
                f"the adapter {name} is a learned prompt ({type(configs[name]).__name__}), which is in no weight of the"
                " model and in no checkpoint: save model.get_base_model(), and serve the prompt beside it"
            )
    return model.get_base_model()


def architecture_of(model: torch.nn.Module) -> type[torch.nn.Module]:
    """The class of a model of transformers that can be imported; fully_shard and others put one of their own before."""
    for cls in type(model).__mro__:
        if any(base.__name__ == "PreTrainedModel" for base in cls.__mro__[1:]):
            found: type[torch.nn.Module] | None = getattr(sys.modules.get(cls.__module__), cls.__name__, None)
            if found is cls:
                return found
    return type(model)


def local(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of FSDP2 or tensor parallelism whose values are all here. Raises `CheckpointError` for another."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device_mesh.size() > 1 and not all(isinstance(placed, Replicate) for placed in tensor.placements):
        raise CheckpointError(f"{name} is sharded over {tensor.device_mesh.size()} processes (DTensor): {_GATHER}")
    return tensor.to_local()


def plain_names(found: Mapping[str, T], known: Container[str]) -> dict[str, T]:
    """`found` under names without those of wrappers, as far as only that makes them names that are `known`.

    Files that were saved from a wrapped model, and programs that were made of one, have `_orig_mod.` (torch.compile)
    anywhere, and `module.` (DataParallel) or `base_model.model.` (peft) in front.
    """
    renamed: dict[str, T] = {}
    for name, value in found.items():
        plain = _plain_name(name)
        renamed[plain if plain != name and name not in known and plain in known else name] = value
    return renamed if len(renamed) == len(found) else dict(found)


def _plain_name(name: str) -> str:
    before = None
    while name != before:
        before, name = name, _COMPILED.sub("", name)
        for prefix in _AROUND:
            name = name.removeprefix(prefix)
    return name
