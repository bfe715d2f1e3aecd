"""Models of many families, written and read back: the judge is the float model with weights rounded by plain torch.

Their code looks at weights of linear layers in its own ways: `_init_weights` writes to those of children (T5,
ModernBERT, SigLIP, Wav2Vec2), T5 casts to the dtype of one, torch.nn.MultiheadAttention (SigLIP) multiplies with one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile.checkpoint.load import load_checkpoint
from qcompile.checkpoint.write.save import save_checkpoint
from qcompile.schemes.layer import QuantizedLinear

T = pytest.importorskip("transformers")
SLOW = pytest.mark.slow

BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 96}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 96,
}
IMAGE = {"image_size": 16, "patch_size": 8}
VISION = {name: size for name, size in BERT.items() if name != "vocab_size"} | IMAGE
SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
AUDIO = {"conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2}
AUDIO |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
LATENT |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
LATENT |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1}


def ids(**more: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 15)[None], **more}


def images() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


FAMILIES: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, torch.Tensor]]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", T5, lambda: ids(decoder_input_ids=torch.ones(1, 3).long())),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", BERT | SPECIAL, ids),
    "siglip": (
        "SiglipVisionConfig",
        "SiglipVisionModel",
        {k: v for k, v in BERT.items() if k[0] != "v"} | IMAGE,
        images,
    ),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC", BERT | AUDIO, lambda: {"input_values": torch.randn(1, 400)}),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", T5, lambda: ids(decoder_input_ids=torch.ones(1, 3).long())),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART, ids),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        BART | {"num_mel_bins": 8, "max_source_positions": 10, "pad_token_id": 1, "decoder_start_token_id": 1},
        lambda: {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.ones(1, 3).long()},
    ),
    "falcon": ("FalconConfig", "FalconForCausalLM", BERT, ids),
    "deberta": ("DebertaV2Config", "DebertaV2ForMaskedLM", BERT, ids),
    "deepseek": ("DeepseekV3Config", "DeepseekV3ForCausalLM", BERT | LATENT | {"num_key_value_heads": 2}, ids),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}, ids),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", BERT | IMAGE, images),
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 16, "patch_size": 2},
        images,
    ),
}
EVERY_DAY = ("t5", "modernbert", "siglip", "wav2vec2")
CASES = [pytest.param(name, marks=() if name in EVERY_DAY else SLOW) for name in FAMILIES]
WEIGHTS = {
    "metadata": {"name": "w8", "description": "FP8 weights, a scale for each row."},
    "rules": [{"quantizer": "*.weight_quantizer", "format": "fp8", "granularity": "per_channel"}],
}


def made(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    config, architecture, sizes, inputs = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(T, architecture)(getattr(T, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 20
    return model, inputs()


def rounded(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(-1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_read_back_it_computes_what_was_written(tmp_path: Path, name: str) -> None:
    model, inputs = made(name)
    report = save_checkpoint(model, tmp_path / "out", format="compressed-tensors", recipe=WEIGHTS, progress=False)
    loaded = load_checkpoint(tmp_path / "out")
    layers = {path: module for path, module in loaded.named_modules() if isinstance(module, QuantizedLinear)}
    assert layers.keys() == report.quantized.keys() and len(layers) > 3
    packed = [path for path in report.unquantized if "head.attention." in path]
    assert packed == (["head.attention.in_proj_weight", "head.attention.out_proj"] if name == "siglip" else [])
    judge = copy.deepcopy(model)
    for path, layer in layers.items():
        weight = judge.get_parameter(path if path in dict(judge.named_parameters()) else f"{path}.weight")
        weight.copy_(rounded(weight))
        assert torch.equal(layer.weight, weight)
    found, wanted = (dict(m.named_buffers()) for m in (loaded, judge))
    assert all(torch.equal(tensor, found[key]) for key, tensor in wanted.items())
    for one, other in zip(outputs(loaded, inputs), outputs(judge, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(model(**inputs, return_dict=False))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_layer_has_the_dtype_that_its_float_one_would_have(tmp_path: Path, dtype: torch.dtype) -> None:
    """T5 casts to it, and transformers keeps one of its layers in float32 where the model is float16."""
    model, inputs = made("t5")
    save_checkpoint(model.to(dtype), tmp_path / "out", format="modelopt", recipe="nvfp4_weight_only", progress=False)
    model.save_pretrained(tmp_path / "float")
    judge = T.T5ForConditionalGeneration.from_pretrained(tmp_path / "float", dtype=dtype)
    loaded: Any = load_checkpoint(tmp_path / "out")
    block, other = loaded.encoder.block[0].layer, judge.encoder.block[0].layer
    for mine, theirs in (
        (block[0].SelfAttention.q, other[0].SelfAttention.q),
        (block[1].DenseReluDense.wo, other[1].DenseReluDense.wo),
    ):
        assert isinstance(mine, QuantizedLinear) and mine.weight.dtype == mine.dtype == theirs.weight.dtype
    assert all(torch.isfinite(tensor).all() for tensor in outputs(loaded, inputs))
    assert loaded.to(torch.float64).encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.float64


@pytest.mark.slow
@torch.no_grad()
def test_a_program_of_t5_is_read_back(tmp_path: Path) -> None:
    import qcompile

    model, inputs = made("t5")
    program = qcompile.quantize(
        model, (), inputs, recipe="fp8_per_channel_per_token", dtype=torch.float32, progress=False
    )
    save_checkpoint(program, tmp_path / "out", format="compressed-tensors", source=model, progress=False)
    found, wanted = load_checkpoint(tmp_path / "out")(**inputs).logits, program.module()(**inputs).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2  # a code moves where attention sums in another order
