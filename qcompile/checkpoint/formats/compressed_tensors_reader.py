"""Reading the compressed-tensors format, whichever of its writers it comes from; what is in the files is in
compressed_tensors.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from passes.formats import INT4_GROUPS
from qcompile.checkpoint.formats import int4
from qcompile.checkpoint.formats.base import Get, SchemeReader
from qcompile.checkpoint.formats.fields import Targets, mapping, names
from qcompile.checkpoint.formats.regexes import Clock
from qcompile.checkpoint.formats.scheme_args import COMPRESSORS, KV_CACHE, scheme_of
from qcompile.checkpoint.formats.stored import StoredLayer, kv_scales
from qcompile.errors import CheckpointError
from qcompile.messages import cut, value
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import Scheme

MIXED = "mixed-precision"
_CLASSES = ("Linear", "LinearBase")


class CompressedTensorsReader(SchemeReader):
    """Reads config_groups with names, `re:` patterns and the class `Linear` as targets."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        _check(config)
        clock = Clock()
        self._ignore = Targets(names(config, "ignore"), clock)
        self._groups: list[tuple[Targets, Scheme]] = []
        for name, group in mapping(config, "config_groups").items():
            fmt = group.get("format") or config.get("format")
            if fmt not in COMPRESSORS:
                raise _problem(f"group {cut(name)} has the format {value(fmt)}; known: {', '.join(COMPRESSORS)}")
            try:
                self._groups.append((Targets(names(group, "targets"), clock), scheme_of(group)))
            except ValueError as e:
                raise _problem(f"group {cut(name)}: {e}") from None
        self.kv_cache = config.get("kv_cache_scheme") is not None

    def scheme(self, name: str) -> Scheme | None:
        if name in self._ignore.names or self._ignore.matches(name):
            return None
        # the order that compressed-tensors defines: names, then patterns, then classes
        picks: tuple[Callable[[Targets], bool], ...] = (
            lambda targets: name in targets.names,
            lambda targets: targets.matches(name),
            lambda targets: not targets.names.isdisjoint(_CLASSES),
        )
        return next((scheme for pick in picks for targets, scheme in self._groups if pick(targets)), None)

    def weight(self, name: str, scheme: Scheme, get: Get, shape: tuple[int, int]) -> QuantizedWeight:
        two_levels = scheme.weight.scale is not None
        if scheme.weight in INT4_GROUPS.values():
            _check_shape(f"{name}.weight_shape", get, shape)
            get = int4.reading(get, f"{name}.weight_packed", shape, words=True)
        return StoredLayer(name, get, shape).weight(
            scheme,
            codes=("weight_packed",) if scheme.weight.packed else ("weight",),
            scale=("weight_scale",),
            global_scale=("weight_global_scale",),
            input_scale=("input_global_scale",) if two_levels else ("input_scale",),
            divides=True,
        )

    def kv_scales(self, attention: str, get: Get) -> tuple[torch.Tensor, torch.Tensor] | None:
        return kv_scales(attention, get) if self.kv_cache else None


def _check_shape(name: str, get: Get, shape: tuple[int, int]) -> None:
    """Raise CheckpointError where the shape that is stored beside packed codes is another."""
    try:
        stored = get(name)
    except KeyError:
        return
    if not stored.is_meta and stored.tolist() != list(shape):
        raise CheckpointError(f"{name} is {stored.tolist()}, and the model has {list(shape)}")


def _check(config: Mapping[str, Any]) -> None:
    """Refuse what changes the meaning of the tensors and is not in the groups."""
    if not config.get("config_groups"):
        raise _problem("no config_groups, so nothing says how layers are quantized")
    if (config.get("format") or MIXED) not in (*COMPRESSORS, MIXED):
        raise _problem(f"format {value(config['format'])}; known: {', '.join((*COMPRESSORS, MIXED))}")
    if mapping(config, "transform_config").get("config_groups"):
        raise _problem("transform_config: rotated weights need their rotation at run time, which is not known here")
    if (sparse := mapping(config, "sparsity_config").get("format", "dense")) != "dense":
        raise _problem(f"sparsity_config {value(sparse)}; known: 'dense'")
    kv_cache = mapping(config, "kv_cache_scheme")
    if config.get("kv_cache_scheme") is not None and any(
        (kv_cache.get(key, default) or default) != KV_CACHE[key]
        for key, default in (("num_bits", 8), ("type", "int"), ("dynamic", False), ("strategy", "tensor"))
    ):
        raise _problem(f"kv_cache_scheme {value(dict(kv_cache))}; known: constant FP8 scales of a tensor, {KV_CACHE}")


def _problem(what: str) -> CheckpointError:
    return CheckpointError(f"config.json, quantization_config of quant_method 'compressed-tensors': {what}")
