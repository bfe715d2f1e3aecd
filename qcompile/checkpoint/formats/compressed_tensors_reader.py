"""Reading the compressed-tensors format, whichever of its writers it comes from; what is in the files is in
compressed_tensors.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from qcompile.checkpoint.formats.base import Get, SchemeReader
from qcompile.checkpoint.formats.scheme_args import KV_CACHE, scheme_of
from qcompile.checkpoint.formats.stored import StoredLayer, kv_scales
from qcompile.errors import CheckpointError
from qcompile.layer import QuantizedWeight, Scheme

MIXED = "mixed-precision"
_FORMATS = ("float-quantized", "naive-quantized", "int-quantized", "nvfp4-pack-quantized")


class CompressedTensorsReader(SchemeReader):
    """Reads config_groups with names, `re:` patterns and the class `Linear` as targets."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        _check(config)
        self._ignore: list[str] = list(config.get("ignore") or [])
        self._groups: list[tuple[list[str], Scheme]] = []
        for name, group in config["config_groups"].items():
            fmt = group.get("format") or config.get("format")
            if fmt not in _FORMATS:
                raise _problem(f"group {name} has the format {fmt!r}; known: {', '.join(_FORMATS)}")
            try:
                self._groups.append((list(group.get("targets") or []), scheme_of(group)))
            except ValueError as e:
                raise _problem(f"group {name}: {e}") from None
        self.kv_cache = config.get("kv_cache_scheme") is not None

    def scheme(self, name: str) -> Scheme | None:
        if any(_matches(name, entry) for entry in self._ignore):
            return None
        # the order that compressed-tensors defines: names, then patterns, then classes
        for pick in (lambda t: t == name, lambda t: _matches(name, t), lambda t: t in ("Linear", "LinearBase")):
            for targets, scheme in self._groups:
                if any(pick(target) for target in targets):
                    return scheme
        return None

    def weight(self, name: str, scheme: Scheme, get: Get, shape: tuple[int, int]) -> QuantizedWeight:
        two_levels = scheme.weight.scale is not None
        return StoredLayer(name, get, shape).weight(
            scheme,
            codes=("weight_packed",) if two_levels else ("weight",),
            scale=("weight_scale",),
            global_scale=("weight_global_scale",),
            input_scale=("input_global_scale",) if two_levels else ("input_scale",),
            divides=True,
        )

    def kv_scales(self, attention: str, get: Get) -> tuple[torch.Tensor, torch.Tensor] | None:
        return kv_scales(attention, get) if self.kv_cache else None


def _matches(name: str, target: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _check(config: Mapping[str, Any]) -> None:
    """Refuse what changes the meaning of the tensors and is not in the groups."""
    if not config.get("config_groups"):
        raise _problem("no config_groups, so nothing says how layers are quantized")
    if (config.get("format") or MIXED) not in (*_FORMATS, MIXED):
        raise _problem(f"format {config['format']!r}; known: {', '.join((*_FORMATS, MIXED))}")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise _problem("transform_config: rotated weights need their rotation at run time, which is not known here")
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _problem(f"sparsity_config {config['sparsity_config']['format']!r}; known: 'dense'")
    kv_cache = config.get("kv_cache_scheme")
    if kv_cache is not None and any(
        (kv_cache.get(key, default) or default) != KV_CACHE[key]
        for key, default in (("num_bits", 8), ("type", "int"), ("dynamic", False), ("strategy", "tensor"))
    ):
        raise _problem(f"kv_cache_scheme {dict(kv_cache)}; known: constant FP8 scales of a tensor, {KV_CACHE}")


def _problem(what: str) -> CheckpointError:
    return CheckpointError(f"config.json, quantization_config of quant_method 'compressed-tensors': {what}")
