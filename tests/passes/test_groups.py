"""Which layers belong together, by the graph and by their names: both over models of many families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from passes.base import run_pipeline
from passes.groups import expert_container, parallel, reads, served_with, siblings
from passes.pipelines import NORMALIZE
from passes.quantize.sites import find_sites
from passes.testing import graph_of
from tests.qcompile.recipe.families import FAMILIES

transformers = pytest.importorskip("transformers")

Groups = set[tuple[str, ...]]
IDS = torch.arange(3, 11).reshape(1, 8)
IMAGE = {"pixel_values": torch.randn(1, 3, 224, 224)}
SMALL_IMAGE = {"pixel_values": torch.randn(1, 3, 32, 32)}
SPEECH = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": IDS}
TEXT = {"input_ids": IDS}
GATED_T5 = dict(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
EXTRA = {
    "t5_gated": ("T5ForConditionalGeneration", GATED_T5 | {"feed_forward_proj": "gated-gelu", "pad_token_id": 0}),
}
INPUTS: dict[str, dict[str, torch.Tensor]] = {
    **dict.fromkeys(("llama", "bert", "mixtral", "gpt_oss", "deepseek_v3", "distilbert", "qwen2_moe", "qwen3"), TEXT),
    **dict.fromkeys(("gemma3", "qwen3_moe", "llama4", "gpt2", "gpt_neox"), TEXT),
    "vit": IMAGE,
    "clip_vision": IMAGE,
    "siglip_vision": IMAGE,
    "swin": SMALL_IMAGE,
    "whisper": SPEECH,
    "t5_gated": {"input_ids": IDS, "decoder_input_ids": IDS},
}

# (found by the graph alone, found by names alone): no server merges any of these. A checkpoint that is made from names
# alone has one scale for each of the first, and one for all of the second.
DIFFERENT: dict[str, tuple[Groups, Groups]] = {
    "distilbert": ({tuple(f"transformer.layer.0.attention.{x}_lin" for x in "kqv")}, set()),
    "qwen2_moe": ({("model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate")}, set()),
    # the keys and values of a cross-attention read the encoder, its queries the decoder
    "whisper": (
        {tuple(f"model.decoder.layers.0.encoder_attn.{x}_proj" for x in "kv")},
        {tuple(f"model.decoder.layers.0.encoder_attn.{x}_proj" for x in "kqv")},
    ),
    "t5_gated": (
        {tuple(f"decoder.block.0.layer.1.EncDecAttention.{x}" for x in "kv")},
        {tuple(f"decoder.block.0.layer.1.EncDecAttention.{x}" for x in "kqv")},
    ),
}


def model(family: str) -> nn.Module:
    class_name, config = EXTRA.get(family) or FAMILIES[family][1:3]
    model_class = getattr(transformers, class_name)
    sizes: dict[str, Any] = {**config}
    if "hidden_size" in sizes:
        sizes["num_hidden_layers"] = 2 if family == "deepseek_v3" else 1  # whose first block is dense
    made: nn.Module = model_class(model_class.config_class(**sizes, use_cache=False)).eval()
    return made


@pytest.mark.everyday(2)
@pytest.mark.parametrize("family", INPUTS)
def test_names_group_what_the_graph_does(family: str) -> None:
    gm = graph_of(model(family), **INPUTS[family])
    run_pipeline(NORMALIZE, gm)
    layers = {site.module: site.consumer for site in find_sites(gm) if site.operand == "weight"}
    by_graph = {tuple(sorted(group)) for group in parallel(layers, lambda name: reads(layers[name])) if group[1:]}
    by_name = {tuple(sorted(group)) for group in parallel(layers, siblings) if group[1:]}
    assert (by_graph - by_name, by_name - by_graph) == DIFFERENT.get(family, (set(), set()))
    assert layers


def test_layers_of_two_modules_are_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)})
            self.b = nn.ModuleDict({"q": nn.Linear(8, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.a["q"](x) + self.a["k"](x) + self.b["q"](x) + self.a["k"](x + 1)
            return result

    gm = graph_of(Two(), torch.randn(2, 8))
    sites = [site for site in find_sites(gm) if site.operand == "weight"]
    groups = parallel(sites, lambda site: reads(site.consumer))
    assert [[site.module for site in group] for group in groups] == [["a.q", "a.k"], ["b.q"], ["a.k"]]
    apart = parallel(sites[:2], lambda site: reads(site.consumer, site.module))
    assert len(apart) == 2  # what is alike besides


def test_what_servers_load_together() -> None:
    assert served_with("model.layers.0.mlp.up_proj") == ("gate_proj", "up_proj")
    assert served_with("model.layers.0.mlp.down_proj") == served_with("encoder.wi_0") == ()
    assert expert_container("model.layers.0.mlp.experts.3.up_proj") == "model.layers.0.mlp.experts"
    assert expert_container("model.layers.0.mlp.shared_expert.up_proj") is None
