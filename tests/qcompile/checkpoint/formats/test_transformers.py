"""transformers dequantizes what is written to the weights that the codes and scales stand for, bit for bit.

Only where facts about its reader allow: whole blocks for the format fp8, one group of layers for compressed-tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from passes.ir import dequantize
from qcompile.checkpoint.formats import FORMATS, Contents
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import FP8_BLOCK, FP8_CHANNEL_TOKEN, FP8_TENSOR, INT8_CHANNEL_TOKEN, NVFP4_W4A4, Scheme
from tests.qcompile.checkpoint.formats.support import quantized

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

CASES = [("fp8", FP8_BLOCK)]
CASES += [
    ("compressed-tensors", scheme)
    for scheme in (FP8_TENSOR, FP8_CHANNEL_TOKEN, FP8_BLOCK, NVFP4_W4A4, INT8_CHANNEL_TOKEN)
]


def values(weight: QuantizedWeight) -> torch.Tensor:
    scale = weight.scale
    if weight.global_scale is not None:
        scale = dequantize(scale, weight.global_scale, format="fp8", dtype=torch.float32)
    return dequantize(weight.codes, scale, format=weight.scheme.weight.name, dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_weights_are_what_the_codes_stand_for(name: str, scheme: Scheme, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=256,
        vocab_size=64,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    tensors = transformers.LlamaForCausalLM(config).bfloat16().state_dict()
    del tensors["lm_head.weight"]
    names = [key.removesuffix(".weight") for key in tensors if key.endswith("_proj.weight")]
    expected = {}
    for layer in names:
        weight = quantized(scheme, tensors.pop(f"{layer}.weight").float())
        expected[layer] = values(weight)
        tensors |= FORMATS[name].tensors(layer, weight)
    contents = Contents(dict.fromkeys(names, scheme), tied={"lm_head": "model.embed_tokens"})
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    files: dict[str, Any] = FORMATS[name].files(contents)
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(config.to_json_string()), **files["config.json"]}))

    options = {}
    if name == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **options)
    for layer in names:
        assert model.get_submodule(layer).weight.equal(expected[layer]), layer
    assert model(torch.arange(16)[None]).logits.isfinite().all()
