"""What each module of a transformers model has to do with quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qcompile.checkpoint.files.tensors import Shaped
from qcompile.checkpoint.hub.layout import Attention, Layer, Part
from qcompile.checkpoint.hub.names import Place

Held = dict[str, list[tuple[str, Place]]]
"""Parameter -> its tensors on the hub, with their places in it."""


def class_name(module: torch.nn.Module) -> str:
    """Qualified, as graphs have it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


class Modules:
    """Reads modules, given which tensors of the hub their parameters are.

    Args:
        ties: parameter -> the one whose tensor it is.
        caches: the model keeps keys and values.
    """

    def __init__(self, held: Held, ties: Mapping[str, str], stored: Mapping[str, Shaped], *, caches: bool) -> None:
        self.held, self.ties, self.stored, self.caches = held, ties, stored, caches

    def is_norm(self, module: torch.nn.Module) -> bool:
        return type(module).__name__.endswith("Norm")

    def attention(self, path: str, module: torch.nn.Module) -> Attention | None:
        """The module as the innermost one that is called an attention: BertSelfAttention, not BertAttention."""
        inner = any("Attention" in type(child).__name__ for child in module.modules() if child is not module)
        name = self._hub_name(f"{path}.") if path and "Attention" in type(module).__name__ and not inner else None
        if name is None:
            return None
        # a place in the cache goes by layer_idx, which vision towers have not
        cached = self.caches and getattr(module, "layer_idx", None) is not None
        return Attention(name, class_name(module), cached, latent=hasattr(module, "kv_lora_rank"))

    def layers(self, path: str, module: torch.nn.Module) -> Iterator[Layer]:
        """The weights of the module itself that have rows and columns."""
        dot = f"{path}." if path else ""
        for leaf, parameter in module.named_parameters(recurse=False):
            packed = isinstance(module, torch.nn.MultiheadAttention) and leaf.endswith("weight")
            if parameter.ndim > 1 and (leaf == "weight" or packed or "expert" in path.lower()):
                name = f"{dot}{leaf}"
                parts, stays, refusal = self._weight(module, name, parameter)
                yield Layer(path if leaf == "weight" else name, class_name(module), parts, stays, refusal)

    def _weight(self, module: torch.nn.Module, name: str, parameter: torch.Tensor) -> tuple[tuple[Part, ...], str, str]:
        """The parts of a weight, why it stays in floating point, and why it cannot be quantized."""
        held = self.held.get(name, [])
        stays = refusal = ""
        if name in self.ties:
            stays = f"its weight is that of {self.ties[name]}, which is written once"
        elif parameter.ndim == 3 and "expert" in name.lower():
            if parts := self._experts(parameter, held):
                return parts, "", ""
            refusal = "its experts are not one matrix each, [rows, columns], in the files of this model"
        elif isinstance(module, torch.nn.MultiheadAttention | NonDynamicallyQuantizableLinear):
            stays = "torch.nn.MultiheadAttention multiplies with the tensor itself, and calls no linear layer"
        elif not isinstance(module, torch.nn.Linear):
            stays = f"it is a {type(module).__name__}, which checkpoints hold in floating point"
        elif len(held) != 1 or held[0][1].reason:
            refusal = held[0][1].reason or "its weight is in several tensors" if held else "its weight is in no file"
        names = [key.removesuffix(".weight") for key, _ in held] or [name.removesuffix(".weight")]
        return tuple(Part(part, (parameter.shape[0], parameter.shape[1])) for part in names), stays, refusal

    def _experts(self, parameter: torch.Tensor, held: list[tuple[str, Place]]) -> tuple[Part, ...]:
        """Slices of a fused weight `[E, N, K]`; nothing if it is not made of the same matrices for each expert."""
        places = {(place.expert, place.part): key for key, place in held if place.expert is not None}
        count = max((place.part for _, place in held), default=0) + 1
        experts, rows, columns = parameter.shape
        if set(places) != {(e, p) for e in range(experts) for p in range(count)}:
            return ()
        parts = []
        for expert in range(experts):
            start = 0
            for key in (places[expert, part] for part in range(count)):
                stop = start + self.stored[key].shape[0]
                parts.append(Part(key.removesuffix(".weight"), (stop - start, columns), expert, start))
                start = stop
            if start != rows:
                return ()
        return tuple(parts)

    def _hub_name(self, dot: str) -> str | None:
        """What the hub calls a module, told from the name of one of its tensors."""
        for name, held in self.held.items():
            tail = name.removeprefix(dot)
            if name.startswith(dot) and f".{held[0][0]}".endswith(f".{tail}"):
                return held[0][0].removesuffix(tail).rstrip(".")
        return None
