"""Reading Model Optimizer's format, in the spellings of all its versions; what is in the files is in modelopt.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from passes.formats import FP8_128X128, INT4_GROUPS, MXFP8, NVFP4
from qcompile.checkpoint.files.json_files import CONFIG, HF_QUANT_CONFIG
from qcompile.checkpoint.formats import int4
from qcompile.checkpoint.formats.base import Get, SchemeReader
from qcompile.checkpoint.formats.fields import mapping, names
from qcompile.checkpoint.formats.skip import is_skipped
from qcompile.checkpoint.formats.stored import StoredLayer, kv_scales
from qcompile.errors import CheckpointError
from qcompile.messages import cut, value
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import FP8_BLOCK, FP8_CHANNEL_TOKEN, FP8_TENSOR, NVFP4_LOW_RANK, NVFP4_W4A4, Scheme

MIXED = "MIXED_PRECISION"
INT4 = "W4A16_AWQ"  # what it calls INT4 in groups, whoever chose the scales

SCHEMES = {
    "FP8": FP8_TENSOR,
    "FP8_PER_CHANNEL_PER_TOKEN": FP8_CHANNEL_TOKEN,
    "fp8_pb_wo": Scheme(FP8_128X128),  # in small letters: the export has no other name for it, readers ignore the case
    "NVFP4": NVFP4_W4A4,
    "W4A16_NVFP4": Scheme(NVFP4),
    "MXFP8": Scheme(MXFP8, MXFP8),
    "NVFP4_SVD": NVFP4_LOW_RANK,
}
LOW_RANK = ("weight_quantizer._svdquant_lora_a", "weight_quantizer._svdquant_lora_b")
_OF_DIFFUSERS = ("svdquant_lora_a", "svdquant_lora_b")  # what its export of diffusion models calls them
PRE_SCALE = "pre_quant_scale"
# Read only: TensorRT-LLM's label of block FP8 W8A8, with the tensors of the format fp8.
_READ_SCHEMES = {"FP8_BLOCK_SCALES": FP8_BLOCK} | {name.upper(): scheme for name, scheme in SCHEMES.items()}


class ModelOptReader(SchemeReader):
    """Reads what Model Optimizer has written since 2024, in either spelling.

    Args:
        quantization: quant_algo, kv_cache_quant_algo, exclude_modules and quantized_layers.
        file: where they were found, for messages.
    """

    def __init__(self, quantization: Mapping[str, Any], file: str) -> None:
        self._file = file
        algorithm = str(quantization.get("quant_algo") or "").upper()
        layers = mapping(quantization, "quantized_layers")
        self._layers: dict[str, Scheme] | None = None
        if algorithm == MIXED:
            if not layers:
                raise CheckpointError(
                    f"{file}: quant_algo MIXED_PRECISION has no quantized_layers to say which is which"
                )
            self._layers = {name: self._known(mapping(layers, name), f"layer {cut(name)}") for name in layers}
        else:
            self._scheme = self._known(quantization, "quantization")
        self._skipped = names(quantization, "exclude_modules")
        self.kv_cache = self._kv_cache(quantization.get("kv_cache_quant_algo"))

    def scheme(self, name: str) -> Scheme | None:
        if is_skipped(name, self._skipped):
            return None
        if self._layers is None:
            return self._scheme
        # the layer itself, or what holds it: fused experts are one entry
        parts = name.split(".")
        owners = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        return next((self._layers[owner] for owner in owners if owner in self._layers), None)

    def weight(self, name: str, scheme: Scheme, get: Get, shape: tuple[int, int]) -> QuantizedWeight:
        if scheme.weight in INT4_GROUPS.values():
            _check_factor(name, get)
            get = int4.reading(get, f"{name}.weight", shape, words=False)
        stored = StoredLayer(name, get, shape)
        weight = stored.weight(
            scheme,
            codes=("weight",),
            scale=("weight_scale_inv", "weight_scale") if scheme == FP8_BLOCK else ("weight_scale",),
            global_scale=("weight_scale_2",),
            input_scale=("input_scale",),
        )
        if scheme.low_rank:
            weight.low_rank = stored.low_rank(*zip(LOW_RANK, _OF_DIFFUSERS, strict=True))
            stored.ones(PRE_SCALE)
        return weight

    def kv_scales(self, attention: str, get: Get) -> tuple[torch.Tensor, torch.Tensor] | None:
        return kv_scales(attention, get) if self.kv_cache else None

    def _known(self, layer: Mapping[str, Any], what: str) -> Scheme:
        algorithm = str(layer.get("quant_algo") or "").upper()
        if algorithm == INT4:
            return self._grouped(layer, what)
        if algorithm not in _READ_SCHEMES:
            known = ", ".join([*_READ_SCHEMES, INT4, MIXED])
            raise CheckpointError(
                f"{self._file}: {what} has quant_algo {value(layer.get('quant_algo'))}; known: {known}"
            )
        scheme = _READ_SCHEMES[algorithm]
        size = layer.get("group_size")
        if scheme.weight == NVFP4 and size not in (None, NVFP4.sizes[0]):
            raise CheckpointError(
                f"{self._file}: {what} has group_size {value(size)}; NVFP4 has blocks of {NVFP4.sizes[0]}"
            )
        return scheme

    def _grouped(self, layer: Mapping[str, Any], what: str) -> Scheme:
        size = layer.get("group_size") or max(INT4_GROUPS)
        if layer.get("has_zero_point") or size not in INT4_GROUPS:
            known, zero = ", ".join(map(str, INT4_GROUPS)), value(layer.get("has_zero_point"))
            raise CheckpointError(
                f"{self._file}: {what} has group_size {value(size)}, has_zero_point {zero}; known"
                f" for {INT4}: symmetric groups of {known}"
            )
        return Scheme(INT4_GROUPS[size])

    def _kv_cache(self, algorithm: object) -> bool:
        if algorithm is None or str(algorithm).upper() in ("", "NONE"):
            return False
        if str(algorithm).upper() != "FP8":
            raise CheckpointError(f"{self._file}: the key/value cache is {value(algorithm)}; known: 'FP8'")
        return True


def newest(section: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> tuple[Mapping[str, Any], str]:
    """The same four keys from whichever spelling is there, and the file that has it.

    Since 0.31 the section of config.json says everything; before that only hf_quant_config.json did, and some tools
    copied its content into config.json.
    """
    legacy = files.get(HF_QUANT_CONFIG, {}).get("quantization")
    if isinstance(section.get("quantization"), Mapping):
        return section["quantization"], CONFIG
    if section.get("quant_algo"):
        # a scheme of 8-bit floats is the word for FP8 here; anything else is left for the reader to refuse
        kv_cache = section.get("kv_cache_scheme")
        if isinstance(kv_cache, Mapping) and (kv_cache.get("num_bits"), kv_cache.get("type")) == (8, "float"):
            kv_cache = "FP8"
        spelled = {"kv_cache_quant_algo": kv_cache, "exclude_modules": section.get("ignore")}
        if isinstance(legacy, Mapping):  # the one thing that the section leaves out
            spelled |= {key: legacy[key] for key in ("group_size", "has_zero_point") if key in legacy}
        return {**spelled, **{k: v for k, v in section.items() if v is not None}}, CONFIG
    if isinstance(legacy, Mapping):
        return legacy, HF_QUANT_CONFIG
    raise CheckpointError("quant_method 'modelopt': neither config.json nor hf_quant_config.json has a quant_algo")


def _check_factor(name: str, get: Get) -> None:
    """Raise CheckpointError where AWQ left a factor for the input, as it does where no norm takes it."""
    try:
        factor = get(f"{name}.pre_quant_scale")
    except KeyError:
        return
    if factor.is_meta or not bool((factor == 1).all()):
        raise CheckpointError(
            f"{name}.pre_quant_scale: AWQ left a factor in front of this layer, which is not known here; export the"
            " model with the norm in front of it quantized along, or without AWQ"
        )
