"""Adapters of peft: what is written is what its own `merge_and_unload` makes of a copy, bit by bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.checkpoint.write.save import save_checkpoint
from qcompile.errors import CheckpointError
from tests.qcompile.checkpoint.models import batch, tiny
from tests.qcompile.checkpoint.test_save_wrapped import RECIPE, assert_written_like, write

peft = pytest.importorskip("peft")


def adapted(base: Any, **options: Any) -> Any:
    """A PeftModel whose adapter does something."""
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options}))
    return trained(model)


def trained(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter += torch.randn_like(parameter) / 20
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": "all-linear"}],
    ids=["lora", "dora", "modules-to-save", "all-linear"],
)
def test_adapters_are_merged_as_peft_does(tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(tiny("llama", num_hidden_layers=1), **options)
    assert_written_like(model, copy.deepcopy(model).merge_and_unload(), tmp_path)


def test_experts_compiled_and_merged_already(tmp_path: Path) -> None:
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapted(tiny("qwen3_moe", num_hidden_layers=1), target_parameters=experts)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_written_like(torch.compile(copy.deepcopy(model)), merged, tmp_path / "compiled")
    model.merge_adapter()
    assert_written_like(model, merged, tmp_path / "merged")


def test_adapters_that_transformers_added(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=1)
    plain = copy.deepcopy(model)
    try:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    except ValueError as error:  # transformers 5.24 wants a PEFT that is not out yet
        pytest.skip(str(error))
    trained(model)
    layer = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    layer.merge()
    plain.model.layers[0].self_attn.q_proj = layer.get_base_layer()
    assert_written_like(model, plain, tmp_path)
    model.disable_adapters()
    with pytest.raises(CheckpointError, match=r"q_proj: the adapter is disabled"):
        write(model, tmp_path / "out")


def test_learned_prompts_and_tied_embeddings_are_refused(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(CheckpointError, match=r"the adapter default is a learned prompt \(PromptTuningConfig\)"):
        write(peft.get_peft_model(tiny("llama", num_hidden_layers=1), config), tmp_path / "out")
    with pytest.warns(UserWarning):
        tied = adapted(tiny("qwen3", num_hidden_layers=1), target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        write(tied, tmp_path / "out")


@pytest.mark.slow
def test_a_program_of_an_adapted_model_is_refused(tmp_path: Path) -> None:
    model = adapted(tiny("llama", num_hidden_layers=1))
    program = qcompile.quantize(model, (), batch(), recipe=RECIPE, dtype=torch.float32, progress=False)
    with pytest.raises(CheckpointError, match=r"q_proj.base_layer, .* it is of an adapter: merge it first"):
        save_checkpoint(program, tmp_path / "out", format="modelopt", source=model, progress=False)
