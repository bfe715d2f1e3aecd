"""What stands around a model and does not belong to it, and models that have no values to capture."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qcompile.compat.dynamo import OptimizedModule, module_inside
from qcompile.errors import CaptureError
from qcompile.messages import some

logger = logging.getLogger("qcompile")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The module within `DistributedDataParallel`, `DataParallel` and `torch.compile`, in its parts, too.

    For inference the wrappers compute what they hold, and names then are those of the model. Parts are put back on the
    way out.

    Raises:
        CaptureError: no module, a script module, or one whose parameters are sharded or have no values.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(_no_module(model))
    inner = _unwrapped(model, "the model")
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for path, owner in list(inner.named_modules()):
            for name, child in list(owner.named_children()):
                found = _unwrapped(child, f"{path}.{name}".removeprefix("."))
                if found is not child:
                    replaced.append((owner, name, child))
                    owner._modules[name] = found
        _check_values(inner)
        yield inner
    finally:
        for owner, name, child in replaced:
            owner._modules[name] = child


def _unwrapped(module: nn.Module, name: str) -> nn.Module:
    while (found := _inside(module)) is not None:
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise CaptureError(
                f"{name} is wrapped in {type(module).__name__}, which has hooks of its own: give the module inside"
            )
        logger.info("%s is taken out of its %s", name, type(module).__name__)
        module = found
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper that changes no result holds; None for any other module."""
    inner: Any = None
    if isinstance(module, nn.DataParallel):
        inner = module.module
    elif isinstance(module, nn.parallel.DistributedDataParallel):
        # with mixed precision it casts its parameters and inputs
        inner = None if getattr(module, "mixed_precision", None) else module.module
    elif isinstance(module, OptimizedModule):
        inner = module_inside(module)
    return inner if isinstance(inner, nn.Module) else None


def _check_values(model: nn.Module) -> None:
    """Raises unless all of the weights are here, and this process has them whole."""
    if scripts := [name or "the model" for name, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]:
        raise CaptureError(
            f"{some(scripts)}: a ScriptModule has no Python code for torch.export; give the nn.Module that it was made"
            " of"
        )
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    if nowhere := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise CaptureError(
            f"{some(nowhere)}: on the device meta, without values: load the weights before (from_pretrained, or"
            " model.to_empty(device=...) and load_state_dict); with offloading, without device_map"
        )
    if sharded := [name for name, tensor in tensors.items() if hasattr(tensor, "full_tensor")]:
        raise CaptureError(
            f"{some(sharded)}: sharded over devices (DTensor, as by fully_shard or tensor parallelism). Gather the"
            " model: torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options=StateDictOptions("
            "full_state_dict=True)), and load_state_dict of that into a model that is not sharded"
        )
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise CaptureError(
                f"{name or 'the model'} is wrapped in FullyShardedDataParallel, whose parameters are flat shards: load"
                " its full state dict into a model that is not sharded"
            )
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise CaptureError(
                f"{name or 'the model'} is wrapped in DistributedDataParallel with mixed precision, which casts: give"
                " its .module, in the dtype that it is to run in"
            )


def _no_module(found: object) -> str:
    kind = type(found).__name__
    if isinstance(found, dict):
        return f"a {kind} of weights has no forward: build the module and give it these by load_state_dict"
    return (
        f"the model is a {kind}; an nn.Module or an ExportedProgram is wanted: put a function into a module's forward"
    )
