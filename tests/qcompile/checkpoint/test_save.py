"""Checkpoints written from a directory, from a model and from a program hold the same codes, and the rest unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qcompile
from passes.ir import DEQUANTIZE
from passes.program import unlift
from qcompile.checkpoint.write.report import CheckpointReport
from qcompile.checkpoint.write.save import save_checkpoint
from qcompile.errors import RecipeError
from qcompile.report.coverage import quantized_modules
from tests.qcompile.checkpoint.models import batch, program, read, same, save, tiny

SLOW = pytest.mark.slow  # a second or two each, and each kind of layer is in Qwen3-MoE
CASES = [
    ("fp8", "fp8_block"),
    ("modelopt", "nvfp4_weight_only"),
    ("modelopt", "fp8_per_channel_per_token"),
    ("compressed-tensors", "nvfp4_weight_only"),
    ("compressed-tensors", "fp8_per_channel_per_token"),
    ("compressed-tensors", "fp8_block"),
    pytest.param("compressed-tensors", "int8_per_channel_per_token", marks=SLOW),
]
FAMILIES = [pytest.param("llama", marks=SLOW), pytest.param("qwen3", marks=SLOW), "qwen3_moe"]


def write(model: Any, directory: Path, **options: Any) -> CheckpointReport:
    return save_checkpoint(model, directory, progress=False, **options)


@pytest.mark.everyday(2)
@pytest.mark.parametrize(("format", "recipe"), CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_directory_model_and_program_give_the_same_tensors(
    tmp_path: Path, family: str, format: str, recipe: str
) -> None:
    model, made = program(family, recipe)
    source = save(model, tmp_path / "source", "60KB")
    streamed = write(source, tmp_path / "streamed", format=format, recipe=recipe, max_shard_size="150KB")
    held = write(model, tmp_path / "held", format=format, recipe=recipe)
    quantized = write(made, tmp_path / "quantized", format=format, source=source)
    assert streamed.quantized == held.quantized == quantized.quantized and streamed.quantized
    assert streamed.unquantized.items() >= {"model.embed_tokens": "Embedding", "lm_head": "linear"}.items()
    assert streamed.coverage == held.coverage == quantized.coverage
    assert sum(count for count, _ in streamed.coverage.values()) == len(streamed.quantized)
    reasons = {decline.module: decline.reason for decline in streamed.declined}
    assert "which checkpoints hold in floating point" in reasons["model.embed_tokens"] and "lm_head" not in reasons

    found = {name: read(tmp_path / name) for name in ("streamed", "held", "quantized")}
    for other in ("held", "quantized"):
        assert found[other].keys() == found["streamed"].keys()
        assert not [name for name, tensor in found["streamed"].items() if not same(tensor, found[other][name])]
    before = read(source)
    unchanged = [name for name in before if name in found["streamed"] and same(before[name], found["streamed"][name])]
    assert {name for name in before if "proj" not in name} == set(unchanged)

    files = {path.name for path in (tmp_path / "streamed").iterdir()}
    assert "tokenizer.json" in files and not files & {"pytorch_model.bin", "original"}
    assert sorted(files) == streamed.files and any("pytorch_model.bin" in notice for notice in streamed.notices)
    config = json.loads((tmp_path / "streamed/config.json").read_text())
    assert config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())


def test_shards_and_their_index(tmp_path: Path) -> None:
    source = save(tiny("qwen3_moe"), tmp_path / "source")
    report = write(source, tmp_path / "out", format="modelopt", recipe="nvfp4_weight_only", max_shard_size="100KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)
    ]
    assert all(path.stat().st_size < 100_000 + 20_000 for path in shards)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = read(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values()) == report.bytes
    for name, file in index["weight_map"].items():  # what belongs together is in one file
        if name.endswith(".weight_scale"):
            assert index["weight_map"][name.removesuffix("_scale")] == file
    write(source, tmp_path / "one", format="modelopt", recipe="nvfp4_weight_only", max_shard_size="5GB")
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]


def test_siblings_and_the_experts_of_a_mixture_share_their_global_scale(tmp_path: Path) -> None:
    source = save(tiny("qwen3_moe"), tmp_path / "source", shard="60KB")  # siblings lie in several shards
    write(source, tmp_path / "out", format="modelopt", recipe="nvfp4_weight_only")
    scales = {k: float(t) for k, t in read(tmp_path / "out").items() if k.endswith("weight_scale_2")}
    layer = "model.layers.0."
    assert len({scales[f"{layer}self_attn.{p}_proj.weight_scale_2"] for p in "qkv"}) == 1
    gate_up = {v for k, v in scales.items() if k.startswith(f"{layer}mlp.experts.") and "down" not in k}
    down = {v for k, v in scales.items() if k.startswith(f"{layer}mlp.experts.") and "down" in k}
    assert len(gate_up) == 1 and len(down) == 1 and gate_up != down


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    ("format", "recipe"),
    [("modelopt", "fp8"), ("modelopt", "nvfp4"), ("compressed-tensors", "fp8"), ("compressed-tensors", "nvfp4")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_static_scales_come_from_the_program(tmp_path: Path, family: str, format: str, recipe: str) -> None:
    model, made = program(family, recipe)
    report = write(made, tmp_path / "out", format=format, source=model)
    tensors, state = read(tmp_path / "out"), made.state_dict
    assert report.kv_cache == (recipe == "fp8") and report.recipe == recipe
    name = "model.layers.0.self_attn.o_proj"
    stored = tensors.get(f"{name}.weight", tensors.get(f"{name}.weight_packed"))
    assert stored is not None and same(stored, state[f"{name}.weight"])
    if recipe == "nvfp4":
        assert same(tensors[f"{name}.weight_scale"], state[f"{name}.weight_block_scale"])
        given = tensors.get(f"{name}.input_scale")
        given = given if given is not None else 1 / tensors[f"{name}.input_global_scale"]
        assert torch.allclose(given.float(), state[f"{name}.input_global_scale"], rtol=1e-2)
        return
    attention = "model.layers.0.self_attn"
    for operand in "kv":
        short, long = f"{attention}.{operand}_scale", f"{attention}.{operand}_proj.{operand}_scale"
        scale = tensors.get(long, tensors.get(short))
        assert scale is not None and torch.allclose(scale.float(), state[short], rtol=1e-2)
    assert any("softmax" in notice for notice in report.notices)


def test_a_tied_head_is_dropped_and_listed(tmp_path: Path) -> None:
    source = save(tiny("qwen3"), tmp_path / "source")
    recipe = qcompile.load_recipe("fp8_block", ["rules[+]={quantizer: '*lm_head*', enable: true}"])
    report = write(source, tmp_path / "out", format="fp8", recipe=recipe)
    tensors = read(tmp_path / "out")
    assert not [name for name in tensors if name.startswith("lm_head")]
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert any(notice.startswith("lm_head stays in floating point: its weight is that of") for notice in report.notices)
    section = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert {"lm_head", "model.embed_tokens"} <= set(section["modules_to_not_convert"])


def test_old_names_of_the_hub_are_kept(tmp_path: Path) -> None:
    """Mixtral's files say block_sparse_moe.experts.0.w1 where the module is mlp.experts.gate_up_proj."""
    model = tiny("mixtral", num_hidden_layers=1)
    source = save(model, tmp_path / "source")
    report = write(source, tmp_path / "out", format="modelopt", recipe=W4_MLP)
    assert set(report.quantized) == {f"model.layers.0.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")}
    tensors, before = read(tmp_path / "out"), read(source)
    quantized = {name.removesuffix("_scale_2") for name in tensors if name.endswith("weight_scale_2")}
    assert quantized == {name for name in before if ".experts." in name}
    made = qcompile.quantize(model, (), batch(), recipe=W4_MLP, dtype=torch.float32, progress=False)
    write(made, tmp_path / "program", format="modelopt", source=source)
    assert all(same(tensor, tensors[name]) for name, tensor in read(tmp_path / "program").items())


@pytest.mark.slow
def test_blocks_from_the_end_are_those_of_the_graph(tmp_path: Path) -> None:
    """Names of a directory and names of a graph are counted alike."""
    model = tiny("llama", num_hidden_layers=3)
    source = save(model, tmp_path / "source")
    recipe = qcompile.load_recipe("fp8_block", ['rules[+]={quantizer: "*layers.-1.*", enable: false}'])
    report = write(source, tmp_path / "out", format="fp8", recipe=recipe)
    assert {name.split(".")[2] for name in report.quantized} == {"0", "1"}
    made = qcompile.quantize(model, (), batch(), recipe=recipe, dtype=torch.float32, progress=False)
    linears = {name for name in quantized_modules(unlift(made))[0] if name.endswith("_proj")}
    assert linears == set(report.quantized)


def test_a_recipe_that_quantizes_nothing_writes_nothing(tmp_path: Path) -> None:
    source = save(tiny("llama"), tmp_path / "source")
    recipe = {**W4_MLP, "rules": [{"quantizer": "*.q_prj.weight_quantizer", "format": "nvfp4"}]}
    with pytest.raises(RecipeError, match=r"w4 quantizes nothing .*nearest: .*\.q_proj\.weight.* It has 16 linear"):
        write(source, tmp_path / "out", format="modelopt", recipe=recipe)
    assert not (tmp_path / "out").exists()


W4_MLP: dict[str, Any] = {
    "metadata": {"name": "w4", "description": "NVFP4 weights of MLPs."},
    "rules": [{"quantizer": "*.mlp.experts.*weight_quantizer", "format": "nvfp4"}],
}


def test_ragged_experts_have_blocks_of_their_own(tmp_path: Path) -> None:
    """64 rows each: in the fused weight gate and up share a block, on the hub they cannot."""
    model = tiny("qwen3_moe", moe_intermediate_size=64, num_hidden_layers=1)
    source = save(model, tmp_path / "source")
    write(source, tmp_path / "out", format="fp8", recipe="fp8_block")
    tensors, name = read(tmp_path / "out"), "model.layers.0.mlp.experts.2.up_proj"
    weight = read(source)[f"{name}.weight"].float()
    assert torch.equal(tensors[f"{name}.weight_scale_inv"], (weight.abs().amax() / 448).reshape(1, 1))
    made = qcompile.quantize(model, (), batch(), recipe="fp8_block", dtype=torch.float32, progress=False)
    with pytest.raises(qcompile.QCompileError, match=r"gate_proj: its 64 rows end within a block"):
        write(made, tmp_path / "program", source=source)
    assert not (tmp_path / "program").exists() and not (tmp_path / "program.partial").exists()


def test_convolutions_and_reduction_axes_that_do_not_fit_stay(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4)
    source = save(transformers.ViTForImageClassification(config), tmp_path / "source")
    recipe = {"metadata": W4_MLP["metadata"], "rules": [{"quantizer": "*.weight_quantizer", "format": "nvfp4"}]}
    report = write(source, tmp_path / "out", format="compressed-tensors", recipe=recipe)
    assert any("projection stays in floating point: it is a Conv2d" in notice for notice in report.notices)
    assert any("blocks of 16 elements, and the reduction axis has 72" in notice for notice in report.notices)
    tensors, before = read(tmp_path / "out"), read(source)
    kept = [name for name in before if "projection.weight" in name]
    assert kept and all(same(before[name], tensors[name]) for name in kept)


def resnet_of_transformers() -> Any:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=16
    )
    return transformers.ResNetForImageClassification(config).eval()


def everything(convolutions: bool = True, linears: bool = True) -> Any:
    names = [*(["convolution"] if convolutions else []), *(["linear"] if linears else [])]
    return {
        "metadata": {"name": "all", "description": "FP8 for weights and inputs."},
        "rules": [
            {"quantizer": f"*.{operand}_quantizer", "operator": name, "format": "fp8"}
            for name in names
            for operand in ("weight", "input")
        ],
    }


def test_convolutions_of_a_program_stay_and_are_listed(tmp_path: Path) -> None:
    """No server has quantized ones."""
    model, x = resnet_of_transformers(), torch.randn(2, 3, 32, 32)
    source = save(model, tmp_path / "source")
    recipes = [everything(), everything(linears=False)]
    both, alone = (
        qcompile.quantize(model, (x,), recipe=recipe, calibration=[x], dtype=torch.float32, progress=False)
        for recipe in recipes
    )
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    report = write(both, tmp_path / "out", format="modelopt", source=source)
    assert {name: report.unquantized[name] for name in names} == dict.fromkeys(names, "convolution")
    assert report.coverage == {"linear": (1, 1), "convolution": (0, len(names))}
    assert all("checkpoints hold in floating point" in report.reasons[name] for name in names)
    assert any("servers compute convolutions in floating point" in notice for notice in report.notices)
    tensors, before = read(tmp_path / "out"), read(source)
    assert all(same(before[f"{name}.weight"], tensors[f"{name}.weight"]) for name in names)
    with pytest.raises(qcompile.QCompileError, match=r"no linear layer .* servers compute convolutions"):
        write(alone, tmp_path / "none", format="modelopt", source=source)


def test_a_power_of_two_recipe(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32, num_hidden_layers=1)
    recipe = qcompile.load_recipe("nvfp4_weight_only", ["calibration.power_of_two=true"])
    write(model, tmp_path / "out", format="modelopt", recipe=recipe)
    made = qcompile.quantize(model, (), batch(), recipe=recipe, dtype=torch.float32, progress=False)
    write(made, tmp_path / "program", format="modelopt", source=model)
    tensors = read(tmp_path / "out")
    assert all(same(tensor, tensors[name]) for name, tensor in read(tmp_path / "program").items())
    assert not [k for k, t in tensors.items() if k.endswith("scale_2") and float(torch.log2(t)) % 1]


def test_dequantized_codes_are_those_of_the_ir(tmp_path: Path) -> None:
    source = save(tiny("llama", torch.float16), tmp_path / "source")
    write(source, tmp_path / "out", format="fp8", recipe="fp8_block")
    tensors, before = read(tmp_path / "out"), read(source)
    for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
        key = name.removesuffix("_scale_inv")
        values = DEQUANTIZE(tensors[key], tensors[name], format="fp8_128x128", dtype=torch.float32)
        assert float((values - before[key].float()).norm() / before[key].float().norm()) < 0.03
