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
from qcompile.compat.transformers import is_initialized, kept_in_float32
from qcompile.errors import CheckpointError
from qcompile.schemes.layer import QuantizedLinear, QuantizedWeight
from qcompile.schemes.scheme import Scheme


@dataclass(frozen=True)
class QuantizedParts:
    """What replaces parts of a model.

    Attributes:
        model: the model on the meta device, as transformers makes it.
        names: where the tensors of the hub go in it.
        modules: path of a linear layer, or of the parameter of fused experts -> what is there instead.
        layers: quantized linear layer, as the hub calls it -> its scheme, as the configuration says it, and (N, K).
        kv_scales: path of an attention -> the scales of its FP8 key/value cache.
    """

    model: Any
    names: HubNames
    modules: dict[str, torch.nn.Module]
    layers: dict[str, tuple[Scheme, tuple[int, int]]]
    kv_scales: Scales

    def make_room_in(self, model: torch.nn.Module) -> None:
        """Take the quantized weights out of `model`, so that nothing is allocated or looked for.

        A tensor without memory is left under the name of each, as no parameter: `_init_weights` of some models writes
        to the weights of children, and of some to all that a module owns. It skips, or harmlessly fills, this one.
        """
        for path in self.modules:
            owner, name = self._owner_of_weight(model, path)
            room = torch.empty_like(owner._parameters.pop(name), device="meta")  # type: ignore[arg-type]
            setattr(owner, name, is_initialized(room))

    def put_into(self, model: Any) -> None:
        """Put the quantized layers where `make_room_in` made room, with the biases that were loaded since."""
        for path, module in self.modules.items():
            owner, name = self._owner_of_weight(model, path)
            if isinstance(module, QuantizedLinear):
                module.dtype = _dtype_of(model, path, getattr(owner, name).dtype)
            delattr(owner, name)
            if isinstance(owner, torch.nn.Linear):
                if owner.bias is not None:
                    module.bias = torch.nn.Parameter(owner.bias, requires_grad=False)
                owner, name = _owner(model, path)
            setattr(owner, name, module)

    def _owner_of_weight(self, model: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
        """The module and the name that a parameter is under: of a linear layer, or of fused experts."""
        owner, name = _owner(model, path)
        found = getattr(owner, name)
        return (found, "weight") if isinstance(found, torch.nn.Module) else (owner, name)


@dataclass(frozen=True)
class _Found:
    """A quantized linear layer of the hub."""

    name: str
    place: Place
    scheme: Scheme


def read_quantized_parts(
    model: Any, reader: SchemeReader, store: TensorStore, *, kv_scales: bool = True
) -> QuantizedParts:
    """Read the codes and scales of every quantized layer of `store`.

    Args:
        model: on the meta device.
        kv_scales: each attention has to have those of an FP8 key/value cache if the configuration says so.

    Raises:
        CheckpointError: names the file and the tensor.
    """
    names = HubNames(model)
    by_path: dict[str, list[_Found]] = defaultdict(list)
    for found in _find(model, names, reader, store):
        by_path[found.place.path].append(found)
    modules, read = {}, {}
    for path, layers in by_path.items():
        shape = _shape(model, path, layers)
        read.update({layer.name: (layer.scheme, shape) for layer in layers})
        if layers[0].place.expert is None:
            modules[path.removesuffix(".weight")] = _linear(path, layers, shape, reader, store)
        else:
            modules[path] = _experts(model, path, layers, shape, reader, store)
    scales = read_kv_scales(model, names, reader, store, complete=kv_scales)
    return QuantizedParts(model, names, modules, read, scales)


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


def _shape(model: Any, path: str, layers: list[_Found]) -> tuple[int, int]:
    """`(N, K)` of each of the matrices that are the parameter `path`."""
    *_, rows, columns = model.get_parameter(path).shape
    parts = 1 if layers[0].place.expert is None else 1 + max(layer.place.part for layer in layers)
    return rows // parts, columns


def _is_linear(model: Any, place: Place) -> bool:
    """Whether the weight is one that formats quantize: of a linear layer, or of fused experts."""
    if place.expert is not None or place.reason:
        return True
    owner, name = _owner(model, place.path)
    return name == "weight" and isinstance(owner, torch.nn.Linear)


def _linear(
    path: str, layers: list[_Found], shape: tuple[int, int], reader: SchemeReader, store: TensorStore
) -> torch.nn.Module:
    if len(layers) > 1:
        raise CheckpointError(f"{store.directory}: {layers[0].name} and {layers[1].name} are both {path} in the model")
    return QuantizedLinear(_read(layers[0], shape, reader, store))


def _experts(
    model: Any, path: str, layers: list[_Found], shape: tuple[int, int], reader: SchemeReader, store: TensorStore
) -> torch.nn.Module:
    owner, _ = _owner(model, path)
    count = model.get_parameter(path).shape[0]
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
        return _read(table[part, expert], shape, reader, store)

    return fuse_experts(path, schemes, [shape[0]] * parts, count, read)


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


def _dtype_of(model: Any, path: str, dtype: torch.dtype) -> torch.dtype:
    """What transformers would have loaded a float layer in: of half-precision models it keeps some in float32."""
    plan = kept_in_float32(model, dtype)
    return next((kept for name, kept in plan.items() if f".{name}." in f".{path}.weight"), dtype)


def _owner(model: torch.nn.Module, path: str) -> tuple[torch.nn.Module, str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
