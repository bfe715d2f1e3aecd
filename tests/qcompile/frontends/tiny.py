"""Tiny quantized checkpoints of transformers models with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers

from qcompile.checkpoint.formats import FORMATS, Contents
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import Scheme
from tests.qcompile.checkpoint.formats.support import quantized

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 96,
}
_CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 64}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"head_dim": 64, "moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
}
IDS = torch.arange(32).reshape(2, 16) * 37 % 96

Change = Callable[[str, QuantizedWeight], QuantizedWeight]


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model of that kind, sides of its linear layers are multiples of 128."""
    config, architecture, own = _CONFIGS[kind]
    made = getattr(transformers, config)(**{**_COMMON, **own, **overrides}, architectures=[architecture], dtype=dtype)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)._from_config(made).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):  # not all ones
            parameter.data += torch.randn_like(parameter) / 10
    return model


def write_checkpoint(
    directory: Path,
    model: Any,
    fmt: str,
    scheme: Scheme | Callable[[str], Scheme | None],
    *,
    change: Change = lambda name, weight: weight,
    kv: tuple[float, float] | None = None,
    head: bool = False,
    **save: Any,
) -> dict[str, QuantizedWeight]:
    """Save `model` with its linear layers but the head quantized; returns what was written, by hub name.

    Args:
        scheme: of every layer, or by hub name.
        change: applied to each layer before it is written.
        kv: scales of the key/value caches.
        head: quantize the head, too.
        save: for `save_pretrained`, which writes the files that are then changed.
    """
    model.save_pretrained(directory, **save)
    written: dict[str, QuantizedWeight] = {}
    places: dict[str, str] = {}
    attentions: set[str] = set()
    for file in sorted(directory.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        for key, tensor in safetensors.torch.load_file(file).items():
            name = key.removesuffix(".weight")
            found = (
                (scheme(name) if callable(scheme) else scheme)
                if _is_linear(key) or (head and name == "lm_head")
                else None
            )
            if found is None:
                tensors[key] = tensor
                continue
            written[name] = change(name, quantized(found, tensor.float()))
            tensors |= FORMATS[fmt].tensors(name, written[name])
            if kv and name.endswith("self_attn.k_proj"):
                attentions.add(name.removesuffix(".k_proj"))
                scales = [torch.tensor(value) for value in kv]
                tensors |= FORMATS[fmt].kv_tensors(name.removesuffix(".k_proj"), *scales)
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    rest = [key.removesuffix(".weight") for key in places if _is_linear(key) or "lm_head" in key or "gate.w" in key]
    rest = [name for name in {*rest, "lm_head", "model.embed_tokens"} if name not in written]
    contents = Contents({name: weight.scheme for name, weight in written.items()}, rest, kv is not None)
    for name, extra in FORMATS[fmt].files(contents).items():
        path = directory / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **extra}))
    return written


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file."""
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
    change(tensors)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json") -> None:
    """Change a JSON file of a checkpoint."""
    content = json.loads((directory / name).read_text())
    change(content)
    (directory / name).write_text(json.dumps(content))


def _is_linear(key: str) -> bool:
    return key.endswith(("proj.weight", "w1.weight", "w2.weight", "w3.weight"))
