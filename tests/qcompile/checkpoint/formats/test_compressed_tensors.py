"""compressed-tensors' and transformers' own classes judge what is written, and make what is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from passes.ir import dequantize
from qcompile.checkpoint.formats import FORMATS, Contents
from qcompile.schemes.layer import QuantizedWeight
from qcompile.schemes.scheme import FP8_BLOCK, FP8_TENSOR, NVFP4_W4A4, Scheme
from tests.qcompile.checkpoint.formats.support import HELD, quantized, reader_for, reader_of_config

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize as ct_dequantize
from compressed_tensors.utils.match import match_name

FORMAT = FORMATS["compressed-tensors"]
NAME = "model.layers.0.mlp.down_proj"


def section_of(contents: Contents) -> dict[str, Any]:
    section: dict[str, Any] = FORMAT.files(contents)["config.json"]["quantization_config"]
    return section


def without_sparsity(config: QuantizationConfig) -> dict[str, Any]:
    return config.model_dump(
        exclude={"moe_sparsity_config"}
    )  # newer than what servers have, and not of a quantized layer


def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    scale = weight.scale
    if weight.global_scale is not None:
        scale = dequantize(scale, weight.global_scale, format="fp8", dtype=torch.float32)
    return dequantize(weight.codes, scale, format=weight.scheme.weight.name, dtype=torch.float32)


@pytest.mark.parametrize("scheme", HELD["compressed-tensors"])
def test_configuration_is_what_its_classes_write(scheme: Scheme) -> None:
    section = section_of(Contents({NAME: scheme}, ["lm_head"], kv_cache=True))
    config = QuantizationConfig.model_validate(section)
    assert without_sparsity(config) == section
    (group,) = config.config_groups.values()
    assert infer_module_format(torch.nn.Linear, group).value == section["format"] == group.format


@pytest.mark.parametrize(("preset", "scheme"), [("FP8", FP8_TENSOR), ("FP8_BLOCK", FP8_BLOCK), ("NVFP4", NVFP4_W4A4)])
def test_schemes_are_its_presets(preset: str, scheme: Scheme) -> None:
    expected = preset_name_to_scheme(preset, ["Linear"]).model_dump(exclude={"format"})
    (group,) = section_of(Contents({NAME: scheme}))["config_groups"].values()
    for kind in ("weights", "input_activations"):  # an observer says how scales were found
        args = {key: value for key, value in expected[kind].items() if key not in ("observer", "zp_dtype")}
        assert group[kind] == args


@pytest.mark.parametrize("scheme", HELD["compressed-tensors"])
def test_its_compressor_reads_the_tensors(scheme: Scheme) -> None:
    weight = quantized(scheme, torch.randn(256, 384, generator=torch.Generator().manual_seed(0)))
    stored = FORMAT.tensors(NAME, weight)
    (group,) = section_of(Contents({NAME: scheme}))["config_groups"].values()
    args = QuantizationScheme.model_validate(group)
    local = {key.removeprefix(f"{NAME}."): tensor for key, tensor in stored.items()}
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    assert set(compressor.compression_param_names(args)) <= set(local)
    result = compressor.decompress(local, args)["weight"]
    if weight.global_scale is None:
        assert result.float().equal(dequantized(weight))
        return
    # its compressor computes in bfloat16; what that is made of computes in float32, too
    torch.testing.assert_close(result.float(), dequantized(weight), rtol=2**-7, atol=0)
    codes = unpack_fp4_from_uint8(local["weight_packed"], 256, 384, dtype=torch.float32)
    result = ct_dequantize(
        codes, local["weight_scale"].float(), args=args.weights, global_scale=local["weight_global_scale"]
    )
    torch.testing.assert_close(result, dequantized(weight), rtol=2**-21, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", ["FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "INT8"])
def test_what_its_compressor_writes_is_read(preset: str, dtype: torch.dtype) -> None:
    """With scales in the dtype of the model, as llm-compressor has them."""
    torch.manual_seed(0)
    n, k = (300, 200) if preset == "FP8_BLOCK" else (96, 64)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    assert args is not None
    weight = torch.randn(n, k, dtype=dtype)
    local: dict[str, torch.Tensor] = {"weight": weight}
    largest = {"FP8": 448.0, "INT8": 127.0}.get(preset, 448.0)
    if args.num_bits == 4:
        local["weight_global_scale"] = (2688 / weight.abs().max().float()).reshape(1)
        blocks = weight.float().unflatten(-1, (-1, 16)).abs().amax(-1)
        local["weight_scale"] = (local["weight_global_scale"] * blocks / 6).to(torch.float8_e4m3fn).to(dtype)
    elif preset == "FP8_BLOCK":
        padded = torch.nn.functional.pad(weight, (0, 56, 0, 84))
        local["weight_scale"] = padded.unflatten(0, (3, 128)).unflatten(2, (2, 128)).abs().amax((1, 3)) / largest
    elif preset == "FP8":
        local["weight_scale"] = (weight.abs().max() / largest).reshape(1)
    else:
        local["weight_scale"] = weight.abs().amax(-1, keepdim=True) / largest
    compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
    stored = compressor.compress(dict(local), scheme)
    if preset == "FP8":
        stored["input_scale"] = torch.tensor([0.01], dtype=dtype)
    elif preset == "NVFP4":
        stored["input_global_scale"] = torch.tensor([300.0])
    expected = compressor.decompress(dict(stored), scheme)["weight"]

    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=scheme.format.value, ignore=["lm_head"])
    reader = reader_of_config(config.model_dump(mode="json"))
    found = reader.scheme(NAME)
    assert found is not None
    files = {f"{NAME}.{key}": tensor for key, tensor in stored.items()}
    result = dequantized(reader.weight(NAME, found, files.__getitem__, (n, k)))
    # its decompressor rounds to the dtype of the scale, and NVFP4 to bfloat16
    rtol = 2**-7 if args.num_bits == 4 or dtype == torch.bfloat16 else 0
    torch.testing.assert_close(result, expected.float(), rtol=rtol, atol=0)


def test_targets_are_patterns_that_its_matcher_understands() -> None:
    schemes = {f"model.layers.{i}.mlp.{p}_proj": NVFP4_W4A4 for i in range(3) for p in ("gate", "up", "down")}
    schemes |= {f"model.layers.{i}.self_attn.{p}_proj": FP8_BLOCK for i in range(3) for p in "qkvo"}
    contents = Contents(schemes, ["lm_head", "visual.layers.0.mlp.up_proj"])
    section = section_of(contents)
    assert section["format"] == "mixed-precision"
    groups = section["config_groups"].values()
    for name, scheme in schemes.items():
        matching = [g["weights"]["num_bits"] for g in groups if any(match_name(name, t) for t in g["targets"])]
        assert matching == [4 if scheme == NVFP4_W4A4 else 8], name
    # a vision tower's layer of the same name is not among them, though it would be ignored
    targets = [target for group in groups for target in group["targets"]]
    assert not any(match_name("visual.layers.0.mlp.up_proj", target) for target in targets)
    # servers put the model into another module
    assert reader_for(FORMAT, contents).scheme("language_model.model.layers.1.self_attn.q_proj") == FP8_BLOCK


@pytest.mark.parametrize("name", ["fp8", "compressed-tensors"])
def test_configuration_is_accepted_by_transformers(name: str) -> None:
    auto = pytest.importorskip("transformers.quantizers.auto")
    contents = Contents({NAME: FP8_BLOCK}, ["lm_head"], tied={"lm_head": "model.embed_tokens"})
    section = FORMATS[name].files(contents)["config.json"]["quantization_config"]
    config = auto.AutoQuantizationConfig.from_dict(section)
    if name == "fp8":
        assert tuple(config.weight_block_size) == (128, 128)
        assert config.modules_to_not_convert == ["lm_head", "model.embed_tokens"]
        skips = pytest.importorskip("transformers.quantizers.quantizers_utils").should_convert_module
        assert skips(NAME, config.modules_to_not_convert)
        assert not skips("lm_head", config.modules_to_not_convert)
    else:
        assert without_sparsity(config.quantization_config) == section
