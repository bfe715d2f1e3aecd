"""Tiny decoders of transformers, with random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 128
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SIZES, **_SLIDING),
    "mistral": lambda: transformers.MistralConfig(**_SIZES, sliding_window=8),
    "phi3": lambda: transformers.Phi3Config(**_SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES, **_EXPERTS),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**_SIZES, **_SLIDING, **_EXPERTS),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
}


def decoder(family: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]())
    return model.eval()


def tokens(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)
