"""Tiny language models for the coverage table: two blocks with every part that the full ones have, random weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.models import Example, Size, random_model, text

TINY = Size(layers=2, hidden=256, heads=8, kv_heads=2, ffn=512, tokens=64, vocabulary=400)


# DeepSeek's multi-head latent attention; in place of grouped queries
LATENT_ATTENTION = {
    "num_key_value_heads": TINY.heads,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


def llama(*, dynamic: bool = False, dtype: torch.dtype = torch.float32) -> Example:
    """Llama: grouped-query attention, SwiGLU."""
    return _decoder(transformers.LlamaForCausalLM, transformers.LlamaConfig(**common()), dynamic, dtype)


def qwen3(*, dynamic: bool = False) -> Example:
    """Qwen3: as Llama, with a norm over each head of q and k."""
    config = transformers.Qwen3Config(**common(), head_dim=32)
    return _decoder(transformers.Qwen3ForCausalLM, config, dynamic)


def gemma3(*, dynamic: bool = False, window: int = 24) -> Example:
    """Gemma3, text: q and k norms, GeGLU, four norms a block, scaled embeddings; every other block has a window."""
    config = transformers.Gemma3TextConfig(
        **common(),
        head_dim=32,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
    )
    return _decoder(transformers.Gemma3ForCausalLM, config, dynamic)


def deepseek_v3(*, dynamic: bool = False) -> Example:
    """DeepSeek-V3 with dense blocks only: multi-head latent attention, whose q and k are wider (48) than its v (32)."""
    config = transformers.DeepseekV3Config(**common() | LATENT_ATTENTION, first_k_dense_replace=TINY.layers)
    return _decoder(transformers.DeepseekV3ForCausalLM, config, dynamic)


def common() -> dict[str, Any]:
    """What the configurations of all decoders share."""
    return {
        "num_hidden_layers": TINY.layers,
        "hidden_size": TINY.hidden,
        "num_attention_heads": TINY.heads,
        "num_key_value_heads": TINY.kv_heads,
        "intermediate_size": TINY.ffn,
        "vocab_size": TINY.vocabulary,
        "use_cache": False,
    }


def _decoder(make: Any, config: Any, dynamic: bool, dtype: torch.dtype = torch.float32) -> Example:
    return on_tokens(random_model(partial(make, config)).to(dtype), dynamic)


def on_tokens(model: torch.nn.Module, dynamic: bool) -> Example:
    """`model`, of the size TINY, with two rows of random tokens."""
    ids = torch.randint(0, TINY.vocabulary, (2, TINY.tokens), generator=torch.Generator().manual_seed(1))
    return text(model, {"input_ids": ids}, TINY, dynamic)
