"""Tiny mixtures of experts for the coverage table: two blocks with every part that the full ones have, random weights.

Experts are fused weights `[experts, out, in]`, as Transformers holds them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.language import LATENT_ATTENTION, common, on_tokens
from benchmarks.models import Example, random_model

_EXPERTS, _TOP_K, _EXPERT_FFN = 8, 2, 128


def mixtral(*, dynamic: bool = False) -> Example:
    """Mixtral: every MLP is a mixture, the weights of the chosen experts sum to 1."""
    config = transformers.MixtralConfig(**common(), num_local_experts=_EXPERTS, num_experts_per_tok=_TOP_K)
    return _decoder(transformers.MixtralForCausalLM, config, dynamic)


def qwen3_moe(*, dynamic: bool = False) -> Example:
    """Qwen3-MoE: as Qwen3, with narrow experts."""
    config = transformers.Qwen3MoeConfig(
        **common(),
        head_dim=32,
        num_experts=_EXPERTS,
        num_experts_per_tok=_TOP_K,
        moe_intermediate_size=_EXPERT_FFN,
        norm_topk_prob=True,
    )
    return _decoder(transformers.Qwen3MoeForCausalLM, config, dynamic)


def deepseek_v3(*, dynamic: bool = False) -> Example:
    """DeepSeek-V3: one dense block and one mixture with a shared expert and experts chosen by groups."""
    config = transformers.DeepseekV3Config(
        **common() | LATENT_ATTENTION,
        first_k_dense_replace=1,
        n_routed_experts=_EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=_TOP_K,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=_EXPERT_FFN,
        norm_topk_prob=True,
    )
    return _decoder(transformers.DeepseekV3ForCausalLM, config, dynamic)


def gpt_oss(*, dynamic: bool = False) -> Example:
    """GPT-OSS: experts stored `[experts, in, out]` with biases, gate and up interleaved, attention with sinks."""
    config = transformers.GptOssConfig(
        **common(), head_dim=32, num_local_experts=_EXPERTS, num_experts_per_tok=_TOP_K, sliding_window=24
    )
    return _decoder(transformers.GptOssForCausalLM, config, dynamic)


def _decoder(make: Any, config: Any, dynamic: bool) -> Example:
    model = random_model(partial(make, config))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # routers start at zero: every expert would be the same
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.normal_(std=0.5)
    return on_tokens(model, dynamic)
