"""Mixtures of experts of Hugging Face models: captured dense, equal to Transformers, and left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from passes.graph import calls
from passes.ir import BATCHED_LINEAR
from qcompile.capture import capture
from qcompile.capture.experts import NAME, dense_experts, dense_experts_forward
from qcompile.errors import CaptureError

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 50, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = SMALL | {
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip
MODELS = {"Mixtral": SMALL, "Qwen3Moe": SMALL, "DeepseekV3": DEEPSEEK, "GptOss": SMALL | {"head_dim": 16}}


def decoder(name: str) -> Any:
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**MODELS[name])).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.everyday(1)
@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers_and_leaves_the_model_alone(name: str) -> None:
    model = decoder(name)
    before = model.config._experts_implementation
    ids = torch.randint(0, 50, (2, 8))
    program = capture(model, (ids,))
    assert model.config._experts_implementation == before != NAME
    assert len(list(calls(program.graph, BATCHED_LINEAR))) == 2
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            torch.testing.assert_close(
                program.module()(ids).logits, model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5
            )


def test_the_implementation_is_put_back_when_the_capture_fails() -> None:
    model = decoder("Mixtral")
    model.set_experts_implementation("batched_mm")

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            assert model.config._experts_implementation == NAME
            return self.model(ids).logits if ids.sum() > 0 else ids

    with pytest.raises(CaptureError):
        capture(Fails(), (torch.randint(0, 50, (2, 8)),))
    assert model.config._experts_implementation == "batched_mm"


def test_a_model_without_experts_is_left_alone() -> None:
    with dense_experts(nn.Sequential(nn.Linear(4, 4))):
        pass


def test_an_expert_that_overflows_on_a_token_of_another_does_no_harm() -> None:
    experts = decoder("Mixtral").model.layers[0].mlp.experts.half()
    with torch.no_grad():
        experts.gate_up_proj[0], experts.down_proj[0] = 1e4, 1e4
        x, index = torch.rand(3, 32).half() + 1, torch.tensor([[1, 2], [3, 1], [2, 3]])
        found = dense_experts_forward(experts, x, index, torch.full((3, 2), 0.5).half())
    assert found.isfinite().all()


def test_experts_of_other_ranks_count_for_nothing() -> None:
    """Expert parallelism marks them with an index past the last, and a weight of zero."""
    experts = decoder("Mixtral").model.layers[0].mlp.experts
    x, index, weights = torch.randn(3, 32), torch.tensor([[0, 4], [4, 4], [3, 1]]), torch.rand(3, 2)
    weights[index == 4] = 0
    experts._is_expert_parallel = True
    with torch.no_grad():
        expected = transformers.integrations.moe.batched_mm_experts_forward(experts, x, index, weights)
        torch.testing.assert_close(dense_experts_forward(experts, x, index, weights), expected, rtol=1e-5, atol=1e-5)
