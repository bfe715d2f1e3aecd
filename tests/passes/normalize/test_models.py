"""Attention of models that other people wrote, after the passes of this stage that concern it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx import GraphModule

from passes.base import PassLog, run_pipeline
from passes.graph import aten
from passes.normalize.attention import NormalizeAttention
from passes.normalize.gqa import UnexpandGroupedQuery
from passes.normalize.mask import NormalizeAttentionMask
from passes.normalize.noops import RemoveNoOps
from passes.normalize.rms_norm import NormalizeRmsNorm
from passes.normalize.views import ViewsToReshape
from passes.sdpa import SDPA, Attention
from passes.testing import count, graph_of, run

transformers = pytest.importorskip("transformers")

PASSES = (
    ViewsToReshape,
    RemoveNoOps,
    NormalizeRmsNorm,
    NormalizeAttention,
    NormalizeAttentionMask,
    UnexpandGroupedQuery,
)
TEXT = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
IMAGE = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
PATCHES = {"image_size": 32, "patch_size": 8}

every_form = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
every_attention = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


def normalized(
    module: nn.Module, *, dynamic: bool, atol: float = 1e-5, pixels: bool = False, **inputs: torch.Tensor
) -> tuple[GraphModule, PassLog]:
    """The graph of `module` after the passes, checked against the graph before, and a second run that does nothing."""
    axes: dict[int, Any] = {0: Dim("batch")} if pixels else {0: Dim("batch"), 1: Dim("length", max=100)}
    shapes = dict.fromkeys(inputs, axes) if dynamic else None
    try:
        gm = graph_of(module, dynamic_shapes=shapes, **inputs)
    except torch._dynamo.exc.UserError as error:
        if torch.__version__ < "2.12":  # it adds a guard on strides that a dynamic decoder cannot meet
            pytest.skip(f"torch {torch.__version__} cannot capture this model: {error}")
        raise
    expected = run(gm, *inputs.values())
    log = run_pipeline(PASSES, gm)
    torch.testing.assert_close(run(gm, *inputs.values()), expected, rtol=1e-4, atol=atol)
    assert run_pipeline(PASSES, gm).fired.total() == 0
    assert count(gm, aten.softmax.int, aten._assert_tensor_metadata.default, aten.clone.default) == 0
    return gm, log


def attentions(gm: GraphModule) -> list[Attention]:
    return [Attention.of(n) for n in gm.graph.nodes if n.target is SDPA]


def ids() -> torch.Tensor:
    return torch.randint(3, 50, (2, 12))


def padding() -> torch.Tensor:
    return torch.ones(2, 12, dtype=torch.long).index_fill_(1, torch.tensor([10, 11]), 0)


@pytest.mark.everyday(1)
@every_form
@every_attention
def test_vit(implementation: str, dynamic: bool) -> None:
    config = transformers.ViTConfig(**IMAGE, **PATCHES, attn_implementation=implementation)
    model = transformers.ViTModel(config)
    gm, _ = normalized(model, dynamic=dynamic, pixels=True, pixel_values=torch.randn(2, 3, 32, 32))
    assert [(a.mask, a.is_causal) for a in attentions(gm)] == [(None, False)] * 2
    assert count(gm, aten.arange.default) == 0


@pytest.mark.everyday(1)
@every_form
@every_attention
@pytest.mark.parametrize("padded", [False, True])
def test_bert(implementation: str, dynamic: bool, padded: bool) -> None:
    model = transformers.BertModel(transformers.BertConfig(**TEXT, attn_implementation=implementation))
    inputs = {"input_ids": ids(), **({"attention_mask": padding()} if padded else {})}
    gm, log = normalized(model, dynamic=dynamic, **inputs)
    found = attentions(gm)
    assert len(found) == 2 and not any(a.is_causal for a in found)
    for attention in found:
        if not padded:
            assert attention.mask is None
        else:
            assert attention.mask is not None
            assert attention.mask.meta["val"].dtype is torch.bool
            assert [str(s) for s in attention.mask.meta["val"].shape[1:3]] == ["1", "1"]
    assert count(gm, aten.index.Tensor) == 0 and log.declined == []


@pytest.mark.everyday(1)
@every_form
@every_attention
@pytest.mark.parametrize("padded", [False, True])
def test_llama(implementation: str, dynamic: bool, padded: bool) -> None:
    config = transformers.LlamaConfig(**DECODER, attn_implementation=implementation)
    inputs = {"input_ids": ids(), **({"attention_mask": padding()} if padded else {})}
    gm, log = normalized(transformers.LlamaModel(config), dynamic=dynamic, **inputs)
    assert [a.is_causal for a in attentions(gm)] == [not padded] * 2
    assert all(a.enable_gqa and a.k.meta["val"].shape[1] == 2 for a in attentions(gm))
    assert count(gm, aten.rms_norm.default) == 5 and count(gm, aten.rsqrt.default) == 0
    assert count(gm, aten.index.Tensor, aten.cumsum.default, aten.expand.default) == 0
    assert log.declined == []


@pytest.mark.slow
@every_attention
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_llama_in_half(implementation: str, dtype: torch.dtype) -> None:
    model = transformers.LlamaModel(transformers.LlamaConfig(**DECODER, attn_implementation=implementation)).to(dtype)
    gm, _ = normalized(model, dynamic=True, atol=0.1 if dtype is torch.bfloat16 else 0.02, input_ids=ids())
    assert all(a.is_causal and a.q.meta["val"].dtype is dtype for a in attentions(gm))
    assert count(gm, aten.rms_norm.default) == 5


@pytest.mark.everyday(1)
@every_form
@every_attention
def test_gpt2(implementation: str, dynamic: bool) -> None:
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=4,
        use_cache=False,
        attn_implementation=implementation,
        bos_token_id=1,
        eos_token_id=2,
    )
    gm, _ = normalized(transformers.GPT2Model(config), dynamic=dynamic, input_ids=ids())
    assert [(a.mask, a.is_causal) for a in attentions(gm)] == [(None, True)] * 2


@pytest.mark.slow
def test_gpt_neo_has_a_causal_buffer_and_a_local_one() -> None:
    config = transformers.GPTNeoConfig(
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        hidden_size=32,
        num_heads=4,
        window_size=30,
        max_position_embeddings=128,
        use_cache=False,
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=2,
    )
    gm, log = normalized(transformers.GPTNeoModel(config), dynamic=True, input_ids=ids())
    assert [a.is_causal for a in attentions(gm)] == [True, False]
    assert len(log.declined) == 1 and "sliding window" in log.declined[0].reason


@pytest.mark.everyday(1)
@every_form
@every_attention
def test_mistral_with_a_sliding_window(implementation: str, dynamic: bool) -> None:
    config = transformers.MistralConfig(**DECODER, sliding_window=8, attn_implementation=implementation)
    gm, log = normalized(transformers.MistralModel(config), dynamic=dynamic, input_ids=ids())
    assert not any(a.is_causal for a in attentions(gm))
    assert all(a.mask is not None and a.mask.meta["val"].dtype is torch.bool for a in attentions(gm))
    assert ["sliding window" in d.reason for d in log.declined] == [True, True]


@pytest.mark.everyday(1)
@every_form
@every_attention
def test_swin_keeps_its_relative_position_bias(implementation: str, dynamic: bool) -> None:
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=4,
        attn_implementation=implementation,
    )
    model = transformers.SwinModel(config)
    gm, _ = normalized(model, dynamic=dynamic, pixels=True, pixel_values=torch.randn(2, 3, 32, 32))
    found = attentions(gm)
    assert len(found) == 2
    assert all(a.mask is not None and a.mask.meta["val"].dtype is torch.float32 for a in found)


@pytest.mark.slow
def test_returned_attentions_are_not_fused() -> None:
    config = transformers.BertConfig(**TEXT, attn_implementation="eager", output_attentions=True)
    gm = graph_of(transformers.BertModel(config), input_ids=ids())
    log = run_pipeline(PASSES, gm)
    assert attentions(gm) == []
    assert len(log.declined) == 2
    assert all(d.reason.startswith("the attention probabilities have another user") for d in log.declined)
    assert log.declined[0].module == "encoder.layer.0.attention.self"
