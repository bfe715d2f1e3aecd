"""What other tools write, in all their spellings, and what is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from passes.formats import FP8, FP8_128X128, FP8_PER_TOKEN, NVFP4
from passes.ir import dequantize
from qcompile.checkpoint.formats import FORMATS, Contents, reader_of
from qcompile.checkpoint.formats.scheme_args import group_of
from qcompile.errors import CheckpointError
from qcompile.schemes.scheme import FP8_BLOCK, FP8_CHANNEL_TOKEN, FP8_TENSOR, NVFP4_W4A4, Scheme
from tests.qcompile.checkpoint.formats.support import (
    assert_same_bits,
    quantized,
    reader_for,
    reader_of_config,
)

NAME = "model.layers.0.mlp.down_proj"
SHAPE = (32, 64)
FP8_SECTION: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODELOPT: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}


def weight_of(scheme: Scheme, shape: tuple[int, int] = SHAPE) -> Any:
    return quantized(scheme, torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def stored(format_name: str, scheme: Scheme, shape: tuple[int, int] = SHAPE) -> dict[str, torch.Tensor]:
    return FORMATS[format_name].tensors(NAME, weight_of(scheme, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (32,), (32, 1)])
@pytest.mark.parametrize("format_name", ["modelopt", "compressed-tensors"])
def test_scales_of_any_spelling(format_name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    scheme = FP8_CHANNEL_TOKEN
    tensors = stored(format_name, scheme)
    scale = torch.full(shape, 0.375, dtype=dtype)
    tensors[f"{NAME}.weight_scale"] = scale
    weight = reader_for(FORMATS[format_name], Contents({NAME: scheme})).weight(NAME, scheme, tensors.__getitem__, SHAPE)
    rows = scale.numel() > 1
    assert weight.scheme == Scheme(FP8, FP8_PER_TOKEN, per_channel=rows)
    assert_same_bits(weight.scale, torch.full((32, 1) if rows else (), 0.375))


def test_power_of_two_scales_are_exact() -> None:
    tensors = stored("fp8", FP8_BLOCK)
    tensors[f"{NAME}.weight_scale_inv"] = torch.tensor([[0.25]]).to(torch.float8_e8m0fnu)
    reader = reader_of_config({**FP8_SECTION, "scale_fmt": "ue8m0"})
    assert reader.weight(NAME, FP8_BLOCK, tensors.__getitem__, SHAPE).scale.tolist() == [[0.25]]


@pytest.mark.parametrize(
    "skip",
    [
        {"modules_to_not_convert": ["lm_head", "model.layers.1", "mlp.gate"]},
        {"ignored_layers": ["lm_head", "model.layers.1", "mlp.gate"]},
        {"modules_to_not_convert": ["lm_head"], "ignored_layers": ["lm_head", "model.layers.1.*", "*.gate"]},
    ],
)
def test_skip_lists_of_fp8(skip: dict[str, Any]) -> None:
    reader = reader_of_config({**FP8_SECTION, **skip})
    skipped = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.gate"]
    assert [reader.scheme(name) for name in skipped] == [None] * 3
    kept = ["model.layers.10.mlp.up_proj", "model.layers.0.mlp.gate_proj"]
    assert [reader.scheme(name) for name in kept] == [FP8_BLOCK] * 2


def test_fp8_without_a_skip_list() -> None:
    """DeepSeek-V3's configuration."""
    reader = reader_of_config({**FP8_SECTION, "fmt": "e4m3"})
    assert reader.scheme("lm_head") is reader.scheme("model.layers.3.mlp.gate") is None
    assert reader.scheme("model.layers.3.mlp.gate_proj") == FP8_BLOCK
    assert reader.scheme("model.layers.3.mlp.experts.5.down_proj") == FP8_BLOCK


@pytest.mark.parametrize("names", [("weight_scale", "input_scale"), ("weight_scale_inv", "activation_scale")])
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_fp8_of_a_tensor(activations: str, names: tuple[str, str]) -> None:
    scheme = FP8_TENSOR if activations == "static" else Scheme(FP8, FP8_PER_TOKEN)
    weight = weight_of(scheme)
    tensors = {f"{NAME}.weight": weight.codes, f"{NAME}.{names[0]}": weight.scale.reshape(1)}
    if weight.input_scale is not None:
        tensors[f"{NAME}.{names[1]}"] = weight.input_scale
    section = {"quant_method": "fp8", "activation_scheme": activations, "ignored_layers": ["lm_head"]}
    reader = FORMATS["fp8"].reader(section, {})
    assert reader.scheme(NAME) == scheme
    back = reader.weight(NAME, scheme, tensors.__getitem__, SHAPE)
    assert_same_bits(back.codes, weight.codes)
    assert_same_bits(back.scale, weight.scale)
    assert_same_bits(back.input_scale, weight.input_scale)


LEGACY = {
    "quant_algo": "nvfp4",
    "kv_cache_quant_algo": "FP8",
    "group_size": 16,
    "exclude_modules": ["lm_head", "*gate*"],
}


@pytest.mark.parametrize(
    ("section", "files"),
    [
        ({}, {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": LEGACY}}),
        ({"quant_method": "modelopt"}, {"hf_quant_config.json": {"quantization": LEGACY}}),
        ({"producer": {"name": "modelopt"}, "quantization": LEGACY}, {}),
        (
            {
                "quant_method": "modelopt_fp4",
                "quant_algo": "NVFP4",
                "ignore": ["lm_head", "*gate*"],
                "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            },
            {},
        ),
    ],
)
def test_spellings_of_modelopt(section: dict[str, Any], files: dict[str, Any], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    reader = reader_of({"quantization_config": section} if section else {}, tmp_path)
    assert reader.scheme(NAME) == NVFP4_W4A4
    assert reader.scheme("lm_head") is reader.scheme("model.layers.2.mlp.gate") is None
    assert reader.kv_cache


def test_targets_of_compressed_tensors() -> None:
    section = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "by_class": group_of(FP8_TENSOR, ["Linear"]),
            "by_pattern": group_of(NVFP4_W4A4, ["re:.*mlp.*"]),
            "by_name": group_of(FP8_BLOCK, ["model.layers.1.mlp.up_proj"]),
        },
        "ignore": ["lm_head", "re:.*layers\\.2\\..*"],
    }
    reader = reader_of_config(section)
    assert reader.scheme("model.layers.1.self_attn.q_proj") == FP8_TENSOR
    assert reader.scheme("model.layers.1.mlp.down_proj") == NVFP4_W4A4
    assert reader.scheme("model.layers.1.mlp.up_proj") == FP8_BLOCK
    assert reader.scheme("lm_head") is reader.scheme("model.layers.2.mlp.up_proj") is None


def test_unequal_scales_of_merged_layers_are_read() -> None:
    reader = reader_of_config(MODELOPT)
    scales = []
    for name, scale in (("q_proj", 0.5), ("k_proj", 0.25)):
        tensors = {key.replace("mlp.down_proj", name): value for key, value in stored("modelopt", FP8_TENSOR).items()}
        tensors[f"model.layers.0.{name}.weight_scale"] = torch.tensor(scale)
        layer = reader.weight(f"model.layers.0.{name}", FP8_TENSOR, tensors.__getitem__, SHAPE)
        scales.append(layer.scale.item())
    assert scales == [0.5, 0.25]


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.output_scale")])
def test_names_of_key_value_scales(names: tuple[str, str]) -> None:
    reader = reader_of_config({**MODELOPT, "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}})
    tensors = {f"a.{names[0]}": torch.tensor([0.5], dtype=torch.bfloat16), f"a.{names[1]}": torch.tensor(0.25)}
    found = reader.kv_scales("a", tensors.__getitem__)
    assert found is not None
    assert [s.item() for s in found] == [0.5, 0.25]
    assert all(s.dtype == torch.float32 and not s.shape for s in found)
    with pytest.raises(CheckpointError, match=r"a\.v_scale is missing"):
        reader.kv_scales("a", {key: tensors[key] for key in list(tensors)[:1]}.__getitem__)


@pytest.mark.parametrize(
    ("format_name", "scheme"), [("compressed-tensors", Scheme(NVFP4)), ("fp8", FP8_BLOCK), ("modelopt", Scheme(NVFP4))]
)
def test_a_block_without_scale_is_zeros(format_name: str, scheme: Scheme) -> None:
    """Whatever its codes are: the values stay, and scales become positive."""
    shape = (256, 256)
    tensors = stored(format_name, scheme, shape)
    scale = next(t for key, t in tensors.items() if key.endswith(("weight_scale", "weight_scale_inv")))
    scale[1, 0] = 0
    weight = reader_for(FORMATS[format_name], Contents({NAME: scheme})).weight(NAME, scheme, tensors.__getitem__, shape)
    assert (weight.scale.float() > 0).all()
    values = dequantize(weight.codes, weight.scale, format=scheme.weight.name, dtype=torch.float32)
    before = weight_of(scheme, shape)
    expected = dequantize(before.codes, scale, format=scheme.weight.name, dtype=torch.float32)
    assert values.equal(expected)


def nan_code(t: torch.Tensor) -> torch.Tensor:
    t.view(torch.uint8)[3, 5] = 0xFF
    return t


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.full_like(t, value)


BROKEN: list[tuple[str, Scheme, str, Callable[[torch.Tensor], torch.Tensor] | None, str]] = [
    ("modelopt", FP8_TENSOR, "weight", None, "is missing"),
    ("modelopt", FP8_TENSOR, "weight_scale", None, "is missing"),
    ("modelopt", FP8_TENSOR, "input_scale", None, "is missing"),
    ("fp8", FP8_BLOCK, "weight_scale_inv", None, r"is missing \(nor weight_scale\)"),
    ("modelopt", NVFP4_W4A4, "weight_scale_2", None, "is missing"),
    ("modelopt", FP8_TENSOR, "weight", nan_code, "holds NaN"),
    ("modelopt", FP8_TENSOR, "weight", lambda t: t.to(torch.bfloat16), "bfloat16, expected float8_e4m3fn; the config"),
    ("modelopt", FP8_TENSOR, "weight", lambda t: t.to(torch.float8_e5m2), "float8_e5m2, expected float8_e4m3fn"),
    ("modelopt", FP8_TENSOR, "weight", lambda t: t[:-1], r"shape \[31, 64\], expected \[32, 64\]"),
    ("modelopt", NVFP4_W4A4, "weight", lambda t: t[:, :-8], r"shape \[32, 24\], expected \[32, 32\]"),
    ("modelopt", NVFP4_W4A4, "weight_scale", lambda t: t.float(), "float32, expected float8_e4m3fn"),
    ("modelopt", NVFP4_W4A4, "weight_scale", lambda t: t[:, :2], r"shape \[32, 2\], expected \[32, 4\]"),
    ("modelopt", NVFP4_W4A4, "weight_scale", with_value(float("nan")), "NaN or infinity"),
    ("modelopt", NVFP4_W4A4, "weight_scale_2", with_value(0.0), "is 0.0"),
    ("modelopt", FP8_TENSOR, "weight_scale", with_value(0.0), "holds 0.0"),
    ("modelopt", FP8_TENSOR, "weight_scale", with_value(-1.0), "holds -1.0"),
    ("modelopt", FP8_TENSOR, "weight_scale", with_value(float("inf")), "NaN or infinity"),
    ("modelopt", FP8_TENSOR, "weight_scale", lambda t: torch.ones(3), r"shape \[3\], expected"),
    ("modelopt", FP8_TENSOR, "weight_scale", lambda t: torch.ones((), dtype=torch.int32), "int32, expected float32"),
    ("modelopt", FP8_TENSOR, "input_scale", with_value(float("nan")), "is nan"),
    ("modelopt", FP8_TENSOR, "input_scale", lambda t: torch.ones(2), r"shape \[2\], expected one number"),
    ("fp8", FP8_BLOCK, "weight_scale_inv", lambda t: torch.ones(1, 2), r"shape \[1, 2\], expected \[1, 1\]"),
    ("compressed-tensors", NVFP4_W4A4, "weight_packed", lambda t: t.view(torch.int8), "int8, expected uint8"),
    ("compressed-tensors", NVFP4_W4A4, "weight_global_scale", with_value(0.0), "is 0.0"),
    ("compressed-tensors", NVFP4_W4A4, "input_global_scale", with_value(float("inf")), "is inf"),
]


@pytest.mark.parametrize(("format_name", "scheme", "key", "damage", "message"), BROKEN)
def test_broken_tensors_are_named(
    format_name: str,
    scheme: Scheme,
    key: str,
    damage: Callable[[torch.Tensor], torch.Tensor] | None,
    message: str,
) -> None:
    tensors = stored(format_name, scheme)
    value = tensors.pop(f"{NAME}.{key}")
    if damage is not None:
        tensors[f"{NAME}.{key}"] = damage(value)
    reader = reader_for(FORMATS[format_name], Contents({NAME: scheme}))
    with pytest.raises(CheckpointError, match=rf"model\.layers\.0\.mlp\.down_proj\.{key} .*{message}"):
        reader.weight(NAME, scheme, tensors.__getitem__, SHAPE)


CT: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
TENSOR = group_of(FP8_TENSOR, ["Linear"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (["fp8"], "quantization_config is a list and no object"),
        ({**FP8_SECTION, "weight_block_size": 128}, "quantization_config cannot be read: TypeError"),
        ({**CT, "config_groups": {"g": 1}}, "quantization_config cannot be read: AttributeError"),
        ({**CT, "config_groups": {"g": TENSOR}, "ignore": ["re:("]}, "is no regular expression"),
        (
            {**FP8_SECTION, "modules_to_not_convert": [1]},
            "modules_to_not_convert holds 1, which is no name of a module",
        ),
        ({"quant_method": "gptq"}, "'gptq'; known: fp8, modelopt, modelopt_mixed, compressed-tensors"),
        ({**FP8_SECTION, "weight_block_size": [1, 128]}, r"\[1, 128\].*known: \[128, 128\]"),
        ({**FP8_SECTION, "activation_scheme": "none"}, "activation_scheme 'none', known: 'static', 'dynamic'"),
        ({**FP8_SECTION, "fmt": "e5m2"}, "fmt 'e5m2', known: 'e4m3'"),
        ({**FP8_SECTION, "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
        ({**MODELOPT, "quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'; known: .*NVFP4.*MIXED_PRECISION"),
        ({**MODELOPT, "quant_algo": "MIXED_PRECISION"}, "no quantized_layers"),
        (
            {**MODELOPT, "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a.b": {"quant_algo": "MXFP6"}}},
            "layer a.b has quant_algo 'MXFP6'",
        ),
        ({**MODELOPT, "quant_algo": "NVFP4", "group_size": 32}, "group_size 32"),
        ({**MODELOPT, "kv_cache_scheme": "NVFP4"}, "key/value cache is 'NVFP4'; known: 'FP8'"),
        ({"quant_method": "modelopt"}, "has a quant_algo"),
        (CT, "no config_groups"),
        (
            {**CT, "format": "marlin-24", "config_groups": {"g": TENSOR}},
            "'marlin-24'; known: float-quantized",
        ),
        (
            {**CT, "config_groups": {"g": {"targets": ["Linear"], "weights": {**INT4, "group_size": 16}}}},
            "group g: weights .*'group_size': 16",
        ),
        (
            {**CT, "config_groups": {"g": {"targets": ["Linear"], "weights": {**INT4, "actorder": "group"}}}},
            "group g: weights with actorder 'group'; known: 'static'",
        ),
        (
            {**MODELOPT, "quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": True},
            "has_zero_point True; known for W4A16_AWQ: symmetric groups of 32, 64, 128",
        ),
        ({**CT, "config_groups": {"g": {**TENSOR, "output_activations": INT4}}}, "group g: output_activations"),
        (
            {**CT, "config_groups": {"g": {**TENSOR, "input_activations": INT4}}},
            "group g: input_activations .* for fp8",
        ),
        ({**CT, "config_groups": {"g": TENSOR}, "transform_config": {"config_groups": {"h": {}}}}, "transform_config"),
        ({**CT, "config_groups": {"g": TENSOR}, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        (
            {**CT, "config_groups": {"g": TENSOR}, "kv_cache_scheme": {"num_bits": 4, "type": "float"}},
            "kv_cache_scheme",
        ),
    ],
)
def test_unknown_configurations_are_named(section: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        reader_of({"quantization_config": section}, tmp_path)


def test_a_float_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not quantized"):
        reader_of({"model_type": "llama"}, tmp_path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json cannot be read"):
        reader_of({}, tmp_path)


def test_block_scales_of_tensorrt_llm() -> None:
    """NVIDIA's own checkpoints label W8A8 in blocks so, with the tensors of the format fp8."""
    reader = reader_of_config({**MODELOPT, "quant_algo": "FP8_BLOCK_SCALES"})
    scheme = reader.scheme(NAME)
    assert scheme == FP8_BLOCK
    tensors = stored("fp8", FP8_BLOCK)
    assert reader.weight(NAME, FP8_BLOCK, tensors.__getitem__, SHAPE).scheme.weight == FP8_128X128
