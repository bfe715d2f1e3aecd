"""NVIDIA Model Optimizer's unified Hugging Face format, key for key as its own export (0.47) writes it.

    X.weight          float8_e4m3fn [N, K];  NVFP4: uint8 [N, K / 2]
    X.weight_scale    float32: scalar, [N], or [N / 128, 1, K / 128, 1];  NVFP4: float8_e4m3fn [N, K / 16]
                      INT4: uint8 [N / 2, K], X.weight_scale float32 [N, K / group]
    X.weight_scale_2  float32 scalar, the global scale of NVFP4; multiplies
    X.input_scale     float32 scalar, where activations have a constant scale
    X.weight_quantizer._svdquant_lora_a, _b     [R, K] and [N, R] in floating point: the low-rank part of NVFP4_SVD;
                      X.pre_quant_scale [K], which the input is multiplied by first, is 1 here
    A.k_proj.k_scale, A.v_proj.v_scale   float32 scalars of an FP8 key/value cache

The configuration is written twice: `hf_quant_config.json` in Model Optimizer's own words, and a section of config.json
in words close to compressed-tensors. W8A8 in blocks has no label here: FP8_PB_WO says weights only, and is read back
so. What vLLM 0.33 runs for it is W8A8 all the same, with activations quantized in blocks of 1 x 128 at run time; it
pads a ragged N, and a ragged K is refused. The report of what is written says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from passes.formats import FP8_128X128, INT4_GROUPS, MXFP8, NVFP4
from passes.groups import expert_container
from qcompile.checkpoint.files.json_files import CONFIG, HF_QUANT_CONFIG
from qcompile.checkpoint.formats.base import CheckpointFormat, Contents, SchemeReader, owned
from qcompile.checkpoint.formats.int4 import as_row_pairs
from qcompile.checkpoint.formats.merged import check_contents, describe
from qcompile.checkpoint.formats.modelopt_reader import (
    INT4,
    LOW_RANK,
    MIXED,
    PRE_SCALE,
    SCHEMES,
    ModelOptReader,
    newest,
)
from qcompile.checkpoint.formats.skip import skipped_names, summarize
from qcompile.checkpoint.formats.stored import as_exponents
from qcompile.errors import CheckpointError
from qcompile.messages import some
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import FP8_BLOCK, Scheme

# Servers tell the tool by this name and pick their reader by it; the version is the one whose export this follows.
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}

_ALGORITHMS = {scheme: algorithm for algorithm, scheme in SCHEMES.items()}
_ALGORITHMS |= {Scheme(fmt): INT4 for fmt in INT4_GROUPS.values()}
_PB_WO, _PC_PT, _SVD = "fp8_pb_wo", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4_SVD"
# Of MIXED_PRECISION servers have read these since it exists; vLLM reads all that are written here from 0.33 on.
_ALWAYS_MIXED = ("FP8", "NVFP4", "W4A16_NVFP4")

_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_SMOOTHED = {"has_zero_point": False, "pre_quant_scale": True}
_GROUPS: dict[str, dict[str, Any]] = {
    "FP8": {"input_activations": _FP8, "weights": _FP8},
    "NVFP4": {"input_activations": _FP4, "weights": _FP4},
    "W4A16_NVFP4": {"weights": _FP4},
    "NVFP4_SVD": {"input_activations": _FP4, "weights": _FP4, **_SMOOTHED},
}
_MIXED_GROUPS = _GROUPS | {
    _PC_PT: {"input_activations": _FP8, "weights": {**_FP8, "strategy": "channel"}},
    _PB_WO: {"quant_algo": _PB_WO},  # for which the export has no other words
}


class ModelOpt(CheckpointFormat):
    """FP8, INT4 and NVFP4, each of their algorithms alone or mixed, with an FP8 key/value cache or without.

    Args:
        listed: write MIXED_PRECISION, with the algorithm of each layer, also where one is that of all. This goes by the
            name that vLLM has for it, modelopt_mixed.
    """

    def __init__(self, *, listed: bool = False) -> None:
        self.name = "modelopt_mixed" if listed else "modelopt"
        self._listed = listed

    def check(self, contents: Contents, shapes: Mapping[str, tuple[int, int]]) -> None:
        check_contents(self.name, contents, shapes, _refusal)
        by_algorithm = _by_algorithm(contents)
        experts = [name for name in by_algorithm.get(_PC_PT, ()) if expert_container(name)]
        if self._mixes(contents) and experts:
            raise CheckpointError(
                f"format {self.name} cannot hold this model: {some(experts)} have {_PC_PT}, which servers do not"
                " read for the experts of a mixture among other layers; use the format compressed-tensors"
            )

    def notices(self, contents: Contents, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        by_algorithm = _by_algorithm(contents)
        found = []
        if blocks := by_algorithm.get(_PB_WO):
            found.append(
                f"{some(blocks)}: FP8_PB_WO says weights only, and vLLM 0.33 runs it with activations quantized to FP8"
                " at run time (W8A8), in blocks of 1 x 128"
            )
            if ragged := [name for name in blocks if shapes[name][0] % 128]:
                found.append(f"{some(ragged)}: 128 does not divide their rows, which vLLM pads from 0.33 on")
        if parts := by_algorithm.get(_SVD):
            found.append(
                f"{some(parts)}: {_SVD} is read by qcompile, and by no server of language models that we know of"
            )
        late = [name for name in by_algorithm if name not in (*_ALWAYS_MIXED, _SVD)]
        if self._mixes(contents) and late:
            found.append(f"{MIXED} with {', '.join(name.upper() for name in late)}: vLLM reads it from 0.33 on")
        return found

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """All scales are float32 (block scales of NVFP4 aside), whatever the dtype of the model."""
        scale, codes = weight.scale, weight.codes
        if weight.scheme.weight in INT4_GROUPS.values():
            codes, scale = as_row_pairs(codes), scale.float()
        elif weight.scheme.weight.powers:
            scale = as_exponents(scale)
        elif weight.scheme.weight == FP8_128X128:
            scale = scale[:, None, :, None]
        elif weight.scheme.per_channel:
            scale = scale[:, 0]
        result = {"weight": codes, "weight_scale": scale}
        if weight.global_scale is not None:
            result["weight_scale_2"] = weight.global_scale.reshape(())
        if weight.input_scale is not None:
            result["input_scale"] = weight.input_scale.reshape(())
        if weight.low_rank is not None:
            down, up = weight.low_rank
            result |= dict(zip(LOW_RANK, (down, up), strict=True))
            result[PRE_SCALE] = torch.ones(down.shape[1], dtype=down.dtype, device=down.device)
        return {f"{name}.{key}": owned(tensor) for key, tensor in result.items()}

    def kv_tensors(self, attention: str, k_scale: torch.Tensor, v_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            f"{attention}.k_proj.k_scale": owned(k_scale.float().reshape(())),
            f"{attention}.v_proj.v_scale": owned(v_scale.float().reshape(())),
        }

    def files(self, contents: Contents) -> dict[str, dict[str, Any]]:
        quantization = self._quantization(contents)
        section: dict[str, Any] = {}
        algorithm = quantization["quant_algo"]
        if algorithm == MIXED:
            section["config_groups"] = _groups(quantization["quantized_layers"])
            section["quantized_layers"] = quantization["quantized_layers"]
        elif algorithm in _GROUPS:
            section["config_groups"] = {"group_0": {**_GROUPS[algorithm], "targets": ["Linear"]}}
        section["ignore"] = quantization.get("exclude_modules", [])
        section["quant_algo"] = algorithm
        if contents.kv_cache:
            section["kv_cache_scheme"] = _FP8
        section |= {"producer": _PRODUCER, "quant_method": "modelopt"}
        return {
            CONFIG: {"quantization_config": section},
            HF_QUANT_CONFIG: {"producer": _PRODUCER, "quantization": quantization},
        }

    def reader(self, quantization_config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> SchemeReader:
        return ModelOptReader(*newest(quantization_config, files))

    def _mixes(self, contents: Contents) -> bool:
        return self._listed or len(set(contents.schemes.values())) > 1

    def _quantization(self, contents: Contents) -> dict[str, Any]:
        """The section `quantization` of hf_quant_config.json. The fused experts of a mixture are one entry."""
        layers = {expert_container(name) or name: _layer(scheme) for name, scheme in contents.schemes.items()}
        result: dict[str, Any] = {"quant_algo": MIXED, "kv_cache_quant_algo": "FP8" if contents.kv_cache else None}
        if self._mixes(contents):
            return result | {"quantized_layers": layers}  # what is not listed is not quantized: no exclude_modules
        skipped = [expert_container(name) or name for name in skipped_names(contents)]
        return result | next(iter(layers.values())) | {"exclude_modules": summarize(skipped, layers)}


def _refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    if scheme == FP8_BLOCK:
        return (
            f"{describe(scheme)}: the format has no label for it, FP8_PB_WO says weights only (and vLLM 0.33 runs that"
            " as W8A8); use the format fp8 or compressed-tensors"
        )
    if scheme not in _ALGORITHMS:
        return f"{describe(scheme)}: the format has no label for it; use the format compressed-tensors"
    if scheme.weight in INT4_GROUPS.values() and shape[0] % 2:
        return f"{INT4} has two rows in a byte, and the weight is {list(shape)}; use the format compressed-tensors"
    if scheme.weight == FP8_128X128 and shape[1] % 128:
        return (
            f"FP8_PB_WO needs a reduction axis divisible by 128 in servers, and the weight is {list(shape)}; use the"
            " format compressed-tensors"
        )
    return None


def _by_algorithm(contents: Contents) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, scheme in contents.schemes.items():
        found.setdefault(_ALGORITHMS[scheme], []).append(name)
    return found


def _layer(scheme: Scheme) -> dict[str, Any]:
    more: dict[str, Any] = {"group_size": NVFP4.sizes[0]} if scheme.weight == NVFP4 else {}
    if scheme.weight == MXFP8:
        more = {"group_size": 32}
    if scheme.weight in INT4_GROUPS.values():  # it says so of all of them, and stores the factor where there is one
        more = {"group_size": scheme.weight.sizes[-1], "has_zero_point": False, "pre_quant_scale": True}
    return {"quant_algo": _ALGORITHMS[scheme], **more, **(_SMOOTHED if scheme.low_rank else {})}


def _groups(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    targets: dict[tuple[str, int | None], list[str]] = {}
    for name, layer in layers.items():
        targets.setdefault((layer["quant_algo"], layer.get("group_size")), []).append(name)
    return {
        f"group_{i}": {**_group(algorithm, size), "targets": sorted(names)}
        for i, ((algorithm, size), names) in enumerate(targets.items())
    }


def _group(algorithm: str, size: int | None) -> dict[str, Any]:
    if algorithm == INT4:
        return {"weights": {"dynamic": False, "num_bits": 4, "type": "int", "group_size": size}}
    if algorithm == "MXFP8":
        own = {"dynamic": False, "num_bits": 8, "type": "float", "group_size": size}
        return {"input_activations": own, "weights": own}
    return _MIXED_GROUPS[algorithm]
