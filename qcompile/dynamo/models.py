"""The modules behind what `torch.compile` was given, their tensors, and the layers that could be quantized."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qcompile.compat.dynamo import function_inside, module_inside
from qcompile.dynamo.packed import inner_tensors

_RECURRENT = nn.RNNBase


def modules_of(function: Any, arguments: Sequence[Any] = ()) -> dict[str, nn.Module]:
    """The modules that a compiled module or function runs, by what it calls them; "" for the only one.

    Args:
        function: a module, a method, or a function, whose modules are those that it refers to.
        arguments: what it is called with: a function may take its module as an argument.

    Raises:
        TypeError: it is nothing that can be called.
    """
    if isinstance(function, nn.Module):
        inner = module_inside(function)
        return {"": function if inner is None else inner}
    original = function_inside(function)
    found = inspect.getclosurevars(inspect.unwrap(original))
    owner = getattr(original, "__self__", None)
    values = {**found.globals, **found.nonlocals, "": owner}
    modules = {name: value for name, value in values.items() if isinstance(value, nn.Module)}
    if isinstance(owner, nn.Module) or not modules:
        modules = {str(i): m for i, m in enumerate((owner, *arguments)) if isinstance(m, nn.Module)}
    return modules if len(modules) != 1 else {"": next(iter(modules.values()))}


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of `module`; of tensor subclasses the plain tensors inside."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield from inner_tensors(tensor)


def owners(modules: Mapping[str, nn.Module]) -> dict[int, list[str]]:
    """Identity of each parameter and buffer -> path of the modules that have it."""
    found: dict[int, list[str]] = {}
    for root, module in modules.items():
        for path, part in module.named_modules(remove_duplicate=False):
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                for inner in () if tensor is None else inner_tensors(tensor):
                    found.setdefault(id(inner), []).append(joined(root, path))
    return found


def layers(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """(path, layer, modules around it) of each layer that could be quantized, and of what Dynamo does not capture.

    That is linear layers of any class, the packed projection of an attention, patch embeddings, fused experts, and
    recurrent layers. A layer inside of another one counts as that one.
    """
    for root, module in modules.items():
        yield from _layers(root, module, [])


def _layers(path: str, module: nn.Module, around: list[nn.Module]) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    if _is_layer(module):
        yield path, module, around
        return
    for name, child in module.named_children():
        yield from _layers(joined(path, name), child, [*around, module])


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, _RECURRENT):
        return True
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # a patch embedding is a linear layer
        return module.kernel_size == module.stride and module.groups == 1 and max(module.kernel_size) > 1
    if isinstance(module, nn.MultiheadAttention):
        return True
    weights = [p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None]
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return bool(weights) or hasattr(module, "parametrizations")
    return any(w.ndim == 3 and w.shape[0] > 1 and isinstance(w, nn.Parameter) for w in weights) and hasattr(
        module, "num_experts"
    )


def joined(*names: str) -> str:
    """A dotted path of those that are not empty."""
    return ".".join(filter(None, names))
