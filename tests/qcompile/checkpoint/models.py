"""Tiny Hugging Face models with random weights, and what was written of them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch.export import ExportedProgram

import qcompile

_SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 96,
    "use_cache": False,
}


def tiny(family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A model of 2 layers, in eval mode, whose weights have outliers as real ones."""
    sizes = {**_SHAPE, "intermediate_size": 256, **changes}
    if family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    elif family == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{"tie_word_embeddings": True, **sizes}))
    elif family == "mixtral":
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(num_local_experts=4, **sizes))
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**{**experts, **sizes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.exp(0.5 * torch.randn_like(parameter)))
    model.config.architectures = [type(model).__name__]
    return model.to(dtype).eval()


@functools.lru_cache
def program(family: str, recipe: str) -> tuple[Any, ExportedProgram]:
    """A model, and the program that `quantize` makes of it in float32."""
    torch.manual_seed(0)
    model, ids = tiny(family, num_hidden_layers=1), batch()
    made = qcompile.quantize(model, (), ids, recipe=recipe, calibration=[ids], dtype=torch.float32, progress=False)
    return model, made


def save(model: Any, directory: Path, shard: str = "200KB") -> Path:
    """The directory that `save_pretrained` makes, a file of a tokenizer, and some not to be carried over."""
    model.save_pretrained(directory, max_shard_size=shard)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"old weights")
    (directory / "original").mkdir()
    return directory


def batch(length: int = 40) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 96, (1, length), generator=torch.Generator().manual_seed(1))}


def read(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by the library."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have the same bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))
