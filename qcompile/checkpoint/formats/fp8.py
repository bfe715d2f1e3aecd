"""`quant_method: fp8`: FP8 in blocks of 128 x 128, activations quantized at run time, as DeepSeek and Qwen publish it.

    X.weight            float8_e4m3fn [N, K]
    X.weight_scale_inv  float32 [ceil(N / 128), ceil(K / 128)], multiplies in spite of its name

Checkpoints with one scale per tensor under the same `quant_method` are read (`weight_scale`, `input_scale`), and not
written: servers disagree on what they mean, and the other two formats say it better.
Servers split and merge weights in whole blocks: with a ragged side vLLM refuses merged (q/k/v) and parallel layers, and
transformers 5.23 computes wrong values without a word. The files follow the definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from passes.formats import FP8, FP8_PER_TOKEN
from qcompile.checkpoint.formats.base import CheckpointFormat, Contents, Get, SchemeReader, owned
from qcompile.checkpoint.formats.fields import names
from qcompile.checkpoint.formats.merged import check_contents, describe
from qcompile.checkpoint.formats.skip import is_skipped, skipped_names
from qcompile.checkpoint.formats.stored import StoredLayer, kv_scales
from qcompile.errors import CheckpointError
from qcompile.messages import cut, value
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import FP8_BLOCK, FP8_TENSOR, Scheme

_BLOCK = [128, 128]
_FP8_DYNAMIC = Scheme(FP8, FP8_PER_TOKEN)

# What no publisher quantizes, though DeepSeek's configuration has no skip list at all: servers tell by the class.
_NEVER_QUANTIZED = ("lm_head", "embed_tokens", "mlp.gate", "router", "shared_expert_gate")

_WEIGHT_SCALE = ("weight_scale_inv", "weight_scale")
_INPUT_SCALE = ("input_scale", "activation_scale")


class BlockFp8(CheckpointFormat):
    """FP8 in blocks for every quantized layer, and nothing else."""

    name = "fp8"

    def check(self, contents: Contents, shapes: Mapping[str, tuple[int, int]]) -> None:
        check_contents(self.name, contents, shapes, _refusal)
        if contents.kv_cache:
            raise CheckpointError(
                "format fp8 has no place for the scales of an FP8 key/value cache: use the format compressed-tensors, "
                "or a recipe that leaves attention alone"
            )

    def tensors(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": owned(weight.codes), f"{name}.weight_scale_inv": owned(weight.scale.float())}

    def kv_tensors(self, attention: str, k_scale: torch.Tensor, v_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        raise CheckpointError(f"{attention}: format fp8 has no place for the scales of an FP8 key/value cache")

    def files(self, contents: Contents) -> dict[str, dict[str, Any]]:
        skipped = skipped_names(contents)
        section = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": _BLOCK,
            "modules_to_not_convert": skipped,  # transformers, SGLang, older vLLM
            "ignored_layers": skipped,  # what vLLM looks for first
        }
        return {"config.json": {"quantization_config": section}}

    def reader(self, quantization_config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> SchemeReader:
        return Fp8Reader(quantization_config)


def _refusal(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    if scheme == FP8_BLOCK:
        return None
    if scheme.low_rank:
        return f"{describe(scheme)}: the format has no words for a low-rank part; leave out svdquant"
    better = "modelopt or compressed-tensors" if scheme == FP8_TENSOR else "compressed-tensors"
    return f"{describe(scheme)}, and this format holds only FP8 in blocks of 128 x 128; use the format {better}"


class Fp8Reader(SchemeReader):
    """Reads block FP8, and FP8 with one scale per tensor."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._scheme = _scheme_of(config)
        keys = [key for key in ("modules_to_not_convert", "ignored_layers") if config.get(key) is not None]
        self._skipped = [name for key in keys for name in names(config, key)] if keys else list(_NEVER_QUANTIZED)
        self.kv_cache = bool(config.get("kv_cache_scheme"))

    def scheme(self, name: str) -> Scheme | None:
        return None if is_skipped(name, self._skipped) else self._scheme

    def weight(self, name: str, scheme: Scheme, get: Get, shape: tuple[int, int]) -> QuantizedWeight:
        scales = _WEIGHT_SCALE if scheme == FP8_BLOCK else _WEIGHT_SCALE[::-1]
        layer = StoredLayer(name, get, shape)
        return layer.weight(scheme, codes=("weight",), scale=scales, input_scale=_INPUT_SCALE)

    def kv_scales(self, attention: str, get: Get) -> tuple[torch.Tensor, torch.Tensor] | None:
        return kv_scales(attention, get) if self.kv_cache else None


def _scheme_of(config: Mapping[str, Any]) -> Scheme:
    """One scheme for the whole checkpoint."""
    block, activations = config.get("weight_block_size"), str(config.get("activation_scheme", "dynamic"))
    problems = []
    if config.get("fmt", "e4m3") != "e4m3":
        problems.append(f"fmt {value(config['fmt'])}, known: 'e4m3'")
    if config.get("expert_dtype", "fp8") != "fp8":
        problems.append(f"expert_dtype {value(config['expert_dtype'])}, known: 'fp8'")
    if config.get("modules_to_convert"):
        problems.append("modules_to_convert: embeddings in FP8 are not known")
    if activations not in ("static", "dynamic"):
        problems.append(f"activation_scheme {value(activations)}, known: 'static', 'dynamic'")
    if block is not None and (list(block) != _BLOCK or activations != "dynamic"):
        problems.append(
            f"weight_block_size {value(block)} with {cut(activations)} activations, known: {_BLOCK} with dynamic ones"
        )
    if problems:
        raise CheckpointError("config.json, quantization_config of quant_method 'fp8': " + "; ".join(problems))
    # transformers takes a missing block size for 128 x 128, vLLM for none; who writes blocks writes the size, too
    if block is not None:
        return FP8_BLOCK
    # what a dynamic scale spans is the server's choice; one for each token is the finest, and what vLLM takes
    return FP8_TENSOR if activations == "static" else _FP8_DYNAMIC
