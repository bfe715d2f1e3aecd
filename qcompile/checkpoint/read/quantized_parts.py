"""The quantized linear layers of a checkpoint as modules, and where in the model of transformers they belong."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from qcompile.checkpoint.files.tensors import FLOATS
from qcompile.checkpoint.formats import SchemeReader
from qcompile.checkpoint.hub.names import HubNames, Place
from qcompile.checkpoint.read.fused_experts import fuse_experts
from qcompile.checkpoint.read.kv_cache import Scales, read_kv_scales
from qcompile.checkpoint.read.store import TensorStore
from qcompile.errors import CheckpointError
from qcompile.layer import QuantizedLinear, QuantizedWeight, Scheme


@dataclass(frozen=True)
class QuantizedParts:
    """What replaces parts of a model.

    Attributes:
        model: the model on the meta device, as transformers makes it.
        names: where the tensors of the hub go in it.
        modules: path of a linear layer, or of the parameter of fused experts -> what is there instead.
        kv_scales: path of an attention -> the scales of its FP8 key/value cache.
    """

    model: Any
    names: HubNames
    modules: dict[str, torch.nn.Module]
    kv_scales: Scales

    def make_room_in(self, model: torch.nn.Module) -> None:
        """Take the quantized weights out of `model`, so that nothing is allocated, initialized or looked for."""
        for path in self.modules:
            owner, name = _owner(model, path)
            original = getattr(owner, name)
            if isinstance(original, torch.nn.Parameter):
                del owner._parameters[name]
                owner._is_hf_initialized = True  # type: ignore[assignment]  # its class would fill what is not there
            setattr(owner, name, _Room(getattr(original, "bias", None)))

    def put_into(self, model: torch.nn.Module) -> None:
        """Put the quantized layers where `make_room_in` made room, with the biases that were loaded since."""
        for path, module in self.modules.items():
            owner, name = _owner(model, path)
            bias = getattr(owner, name).bias
            if bias is not None:
                module.bias = torch.nn.Parameter(bias, requires_grad=False)
            setattr(owner, name, module)


class _Room(torch.nn.Module):
    """Stands for a quantized layer while the rest of the model is loaded."""

    def __init__(self, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias


@dataclass(frozen=True)
class _Found:
    """A quantized linear layer of the hub."""

    name: str
    place: Place
    scheme: Scheme


def read_quantized_parts(model: Any, reader: SchemeReader, store: TensorStore) -> QuantizedParts:
    """Read the codes and scales of every quantized layer of `store`.

    Args:
        model: on the meta device.

    Raises:
        CheckpointError: names the file and the tensor.
    """
    names = HubNames(model)
    by_path: dict[str, list[_Found]] = defaultdict(list)
    for found in _find(model, names, reader, store):
        by_path[found.place.path].append(found)
    modules = {}
    for path, layers in by_path.items():
        if layers[0].place.expert is None:
            modules[path.removesuffix(".weight")] = _linear(model, path, layers, reader, store)
        else:
            modules[path] = _experts(model, path, layers, reader, store)
    return QuantizedParts(model, names, modules, read_kv_scales(model, names, reader, store))


def _find(model: Any, names: HubNames, reader: SchemeReader, store: TensorStore) -> list[_Found]:
    """Every linear layer of the hub that is quantized, and has any tensor in the files."""
    found = []
    for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor in store):
        place = names.place(f"{name}.weight")
        if place is None or not _is_linear(model, place):
            continue
        scheme = reader.scheme(name)
        if scheme is None:
            continue
        if place.reason:
            if f"{name}.weight" in store and store[f"{name}.weight"].dtype in FLOATS:
                continue  # a convolution, say, which skip lists need not name
            raise CheckpointError(f"{store.directory}: {name} is quantized, and {place.reason}")
        found.append(_Found(name, place, scheme))
    return found


def _is_linear(model: Any, place: Place) -> bool:
    """Whether the weight is one that formats quantize: of a linear layer, or of fused experts."""
    if place.expert is not None or place.reason:
        return True
    owner, name = _owner(model, place.path)
    return name == "weight" and isinstance(owner, torch.nn.Linear)


def _linear(model: Any, path: str, layers: list[_Found], reader: SchemeReader, store: TensorStore) -> torch.nn.Module:
    if len(layers) > 1:
        raise CheckpointError(f"{store.directory}: {layers[0].name} and {layers[1].name} are both {path} in the model")
    weight = model.get_parameter(path)
    return QuantizedLinear(_read(layers[0], (weight.shape[0], weight.shape[1]), reader, store))


def _experts(model: Any, path: str, layers: list[_Found], reader: SchemeReader, store: TensorStore) -> torch.nn.Module:
    owner, _ = _owner(model, path)
    count, rows, depth = model.get_parameter(path).shape
    if getattr(owner, "has_bias", True) or getattr(owner, "is_transposed", True):
        raise CheckpointError(
            f"{store.directory}: {layers[0].name} is quantized, and {type(owner).__name__} has a bias or transposed"
            " weights, which is not supported"
        )
    table = {(layer.place.part, layer.place.expert): layer for layer in layers}
    parts = 1 + max(layer.place.part for layer in layers)
    for part, expert in ((p, e) for p in range(parts) for e in range(count)):
        if (part, expert) not in table:
            like = table.get((part, next(iter(table))[1]), layers[0]).name
            raise CheckpointError(
                f"{store.directory}: part {part} of expert {expert} of {path} is missing or not quantized, while {like}"
                " is; all experts of a layer have to be quantized the same way"
            )
    schemes = [_one_scheme([table[part, expert] for expert in range(count)], store) for part in range(parts)]

    def read(part: int, expert: int) -> QuantizedWeight:
        return _read(table[part, expert], (rows // parts, depth), reader, store)

    return fuse_experts(path, schemes, [rows // parts] * parts, count, read)


def _one_scheme(layers: list[_Found], store: TensorStore) -> Scheme:
    for layer in layers:
        if layer.scheme != layers[0].scheme:
            raise CheckpointError(
                f"{store.directory}: {layers[0].name} and {layer.name} are quantized in different ways; all experts"
                " of a layer have to be quantized the same way"
            )
    return layers[0].scheme


def _read(layer: _Found, shape: tuple[int, int], reader: SchemeReader, store: TensorStore) -> QuantizedWeight:
    try:
        return reader.weight(layer.name, layer.scheme, store.get, shape)
    except CheckpointError as error:
        files = {str(store[name].path) for name in store.under(layer.name)}
        raise CheckpointError(f"{', '.join(sorted(files))}: {error}") from error


def _owner(model: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
