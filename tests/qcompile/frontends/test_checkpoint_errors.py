"""Checkpoints that are broken, or say what is not understood: one clear error each."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile.checkpoint.load import load_checkpoint
from qcompile.errors import CheckpointError, SourceError
from qcompile.schemes.scheme import FP8_BLOCK, FP8_CHANNEL_TOKEN, FP8_TENSOR, NVFP4_W4A4, Scheme
from qcompile.source import load_source

transformers = pytest.importorskip("transformers")

from tests.qcompile.frontends.tiny import edit, edit_config, tiny_model, write_checkpoint  # noqa: E402

Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints to copy, each written once."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            path = made[kind] = tmp_path_factory.mktemp(kind)
            if kind == "fp8":
                write_checkpoint(path, tiny_model("llama"), "fp8", FP8_BLOCK, max_shard_size="400KB")
            elif kind == "kv":
                write_checkpoint(path, tiny_model("llama"), "modelopt", FP8_TENSOR, kv=(0.05, 0.01))
            elif kind == "moe":
                write_checkpoint(path, tiny_model("qwen3_moe"), "modelopt", FP8_TENSOR)
            else:
                scheme = {"tensor": FP8_TENSOR, "nvfp4": NVFP4_W4A4}[kind]
                write_checkpoint(path, tiny_model("llama"), "modelopt", scheme)
        return made[kind]

    return make


@pytest.fixture
def copied(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        return Path(shutil.copytree(written(kind), tmp_path / "model"))

    return copy


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    for word in words:
        assert word in str(caught.value)


def file_of(path: Path, tensor: str) -> Path:
    places = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    return path / str(places[tensor])


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


# --- files


def test_truncated_shard(copied: Callable[[str], Path]) -> None:
    path = copied("fp8")
    file = file_of(path, f"{Q}.weight")
    file.write_bytes(file.read_bytes()[:-100])
    refused(path, str(file), "truncated")


def test_index_that_names_a_file_that_is_not_there(copied: Callable[[str], Path]) -> None:
    path = copied("fp8")
    file = file_of(path, f"{Q}.weight")
    file.unlink()
    refused(path, "index.json", file.name, "not there")


def test_shard_without_a_tensor_of_the_index(copied: Callable[[str], Path]) -> None:
    path = copied("fp8")
    file = file_of(path, f"{Q}.weight")
    edit(file, lambda tensors: tensors.pop(f"{Q}.weight"))
    refused(path, file.name, f"{Q}.weight")


def test_no_weights(copied: Callable[[str], Path]) -> None:
    path = copied("tensor")
    (path / "model.safetensors").unlink()
    refused(path, str(path), "model.safetensors")


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json", "cannot be read")


# --- tensors


def test_missing_scale(copied: Callable[[str], Path]) -> None:
    path = copied("tensor")
    edit(path / "model.safetensors", lambda tensors: tensors.pop(f"{Q}.weight_scale"))
    refused(path, "model.safetensors", f"{Q}.weight_scale", "missing")


def test_missing_codes(copied: Callable[[str], Path]) -> None:
    path = copied("tensor")
    edit(path / "model.safetensors", lambda tensors: tensors.pop(f"{Q}.weight"))
    refused(path, "model.safetensors", f"{Q}.weight", "missing")


def test_missing_layer(copied: Callable[[str], Path]) -> None:
    path = copied("tensor")
    edit(
        path / "model.safetensors", lambda t: [t.pop(f"{Q}.{key}") for key in ("weight", "weight_scale", "input_scale")]
    )
    refused(path, str(path), f"{Q}.weight")


def test_missing_float(copied: Callable[[str], Path]) -> None:
    path = copied("tensor")
    edit(path / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    refused(path, str(path), "model.norm.weight")


@pytest.mark.parametrize(
    "kind, tensor, value, word",
    [
        ("tensor", "weight", torch.zeros(128, 128, dtype=torch.bfloat16), "bfloat16"),
        ("tensor", "weight", torch.zeros(128, 64).to(torch.float8_e4m3fn), "shape"),
        ("tensor", "weight", torch.full((128, 128), torch.nan).to(torch.float8_e4m3fn), "NaN"),
        ("tensor", "weight_scale", torch.tensor(torch.nan), "NaN"),
        ("tensor", "weight_scale", torch.tensor(0.0), "positive"),
        ("tensor", "weight_scale", torch.tensor(-1.0), "positive"),
        ("tensor", "input_scale", torch.tensor(torch.inf), "inf"),
        ("tensor", "weight_scale", torch.tensor(1), "int64"),
        ("nvfp4", "weight_scale", torch.ones(128, 8), "float32"),
        ("nvfp4", "weight_scale", torch.full((128, 8), torch.nan).to(torch.float8_e4m3fn), "NaN"),
        ("nvfp4", "weight_scale_2", torch.tensor(0.0), "positive"),
    ],
)
def test_bad_tensor(copied: Callable[[str], Path], kind: str, tensor: str, value: torch.Tensor, word: str) -> None:
    path = copied(kind)
    edit(path / "model.safetensors", put(f"{Q}.{tensor}", value))
    refused(path, str(path / "model.safetensors"), f"{Q}.{tensor}", word)


def test_float_of_the_wrong_shape(copied: Callable[[str], Path]) -> None:
    path = copied("tensor")
    edit(path / "model.safetensors", put("model.norm.weight", torch.ones(7)))
    refused(path, str(path), "model.norm.weight", "[7]", "[128]")


def test_quantizer_that_nobody_reads(copied: Callable[[str], Path]) -> None:
    path = copied("tensor")
    edit(path / "model.safetensors", put("model.layers.0.mlp.act_fn.input_scale", torch.tensor(1.0)))
    refused(path, "model.safetensors", "model.layers.0.mlp.act_fn.input_scale", "nothing reads it")


def test_codes_that_the_configuration_calls_floating_point(copied: Callable[[str], Path]) -> None:
    path = copied("fp8")

    def skip(config: dict[str, Any]) -> None:
        for key in ("modules_to_not_convert", "ignored_layers"):
            config["quantization_config"][key].append(Q)

    edit_config(path, skip)
    refused(path, file_of(path, f"{Q}.weight").name, f"{Q}.weight", "float8_e4m3fn", "not quantized")


# --- configurations and models


def test_unknown_method(copied: Callable[[str], Path]) -> None:
    path = copied("tensor")
    edit_config(path, lambda config: config["quantization_config"].update(quant_method="gptq"))
    refused(path, "gptq", "modelopt")


def test_checkpoint_that_is_not_quantized(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


def test_unknown_architecture(copied: Callable[[str], Path]) -> None:
    path = copied("tensor")
    edit_config(path, lambda config: config.update(architectures=["NoSuchModel"]))
    refused(path, "NoSuchModel")


def test_without_transformers(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = copied("tensor")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(path, "pip install 'qcompile[transformers]'")


def test_quantized_weights_cannot_be_made_up(copied: Callable[[str], Path]) -> None:
    with pytest.raises(SourceError, match="quantized"):
        load_source(str(copied("tensor")), random_weights=0)


def test_key_value_cache_without_scales(copied: Callable[[str], Path]) -> None:
    path = copied("kv")
    names = [f"model.layers.1.self_attn.{n}_proj.{n}_scale" for n in "kv"]
    edit(path / "model.safetensors", lambda tensors: [tensors.pop(name) for name in names])
    refused(path, "model.layers.1.self_attn", "k_scale")


def test_key_value_cache_of_an_attention_that_cannot_be_reached(
    copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_supports_sdpa", False)  # falls back to eager attention
    refused(copied("kv"), "model.layers.0.self_attn", "LlamaAttention", "key/value cache")


def test_expert_that_is_not_quantized(tmp_path: Path) -> None:
    def scheme(name: str) -> Scheme | None:
        return None if "layers.1.mlp.experts.2.up_proj" in name else FP8_TENSOR

    write_checkpoint(tmp_path, tiny_model("qwen3_moe"), "compressed-tensors", scheme)
    refused(tmp_path, "expert 2", "model.layers.1.mlp.experts.gate_up_proj", "same way")


def test_experts_in_different_schemes(tmp_path: Path) -> None:
    def scheme(name: str) -> Scheme:
        return FP8_CHANNEL_TOKEN if "experts.3." in name else FP8_BLOCK

    write_checkpoint(tmp_path, tiny_model("qwen3_moe"), "compressed-tensors", scheme)
    refused(tmp_path, "experts.3.", "different ways")


def test_missing_expert(copied: Callable[[str], Path]) -> None:
    path = copied("moe")
    name = "model.layers.0.mlp.experts.1.down_proj"
    edit(
        path / "model.safetensors", lambda t: [t.pop(f"{name}.{k}") for k in ("weight", "weight_scale", "input_scale")]
    )
    refused(path, "expert 1", "model.layers.0.mlp.experts.down_proj")
