"""Configurations of another type, depth or size than they have to be: one sentence that names the file and the key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import qcompile
from qcompile.errors import CalibrationError, CheckpointError
from qcompile.source.preprocessing import IMAGES, load_preprocessor

pytest.importorskip("transformers")

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": 64}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
CT = {"quant_method": "compressed-tensors", "format": "naive-quantized", "config_groups": {"g": GROUP}}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
MIXED = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
HUGE = 10**2_000
LONG = "n" * 10**6


def quantized(**changes: Any) -> dict[str, Any]:
    return {**LLAMA, "quantization_config": {**FP8, **changes}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("[" * 100_000, r"config\.json cannot be read: it is nested too deeply"),
        ("9" * 5_000, r"config\.json cannot be read: ValueError: Exceeds the limit"),
        ("[]", r"config\.json holds no JSON object"),
        ("\udcff", r"config\.json cannot be read: UnicodeDecodeError"),
        ({**LLAMA, "num_hidden_layers": 2**31}, r"config\.json: num_hidden_layers is 2147483648, more than 1000,"),
        ({**LLAMA, "text_config": {"n_layer": HUGE}}, r"config\.json: n_layer is a number of 6644 bits"),
        ({**LLAMA, "text_config": []}, r"is not quantized"),
        ({**LLAMA, "quantization_config": [1]}, r"config\.json: quantization_config is a list and no object"),
        ({**LLAMA, "quantization_config": 1}, r"config\.json: quantization_config is a int and no object"),
        (quantized(quant_method=[LONG]), r"has quant_method \['n+\.\.\.[n.]+'\]; known: fp8"),
        (quantized(weight_block_size=HUGE), r"quantization_config cannot be read: TypeError"),
        (quantized(weight_block_size=[float("nan"), HUGE]), r"weight_block_size \[nan, a number of 6644 bits\]"),
        (quantized(modules_to_not_convert="lm_head"), r"modules_to_not_convert is 'lm_head', and has to be a list"),
        (quantized(ignored_layers=[["x"]]), r"ignored_layers holds \['x'\], which is no name of a module"),
        (quantized(ignored_layers=[LONG]), r"ignored_layers holds 'n+\.\.\.n+', which is no name of a module"),
        (quantized(activation_scheme=LONG), r"activation_scheme 'n+\.\.\.n+', known: 'static'"),
        (quantized(**CT, ignore={"a": 1}), r"ignore is \{'a': 1\}, and has to be a list"),
        (quantized(**CT, ignore=["re:("]), r"'re:\(' is no regular expression"),
        (quantized(**{**CT, "config_groups": [1]}), r"config_groups is \[1\], and has to be an object"),
        (quantized(**{**CT, "config_groups": {"g": {**GROUP, "targets": 5}}}), r"targets is 5, and has to be a list"),
        (quantized(**{**CT, "config_groups": {LONG: {}}}), r"group n+\.\.\.n+: no weights"),
        (quantized(**CT, kv_cache_scheme=["x"]), r"kv_cache_scheme is \['x'\], and has to be an object"),
        (quantized(**CT, sparsity_config="x"), r"sparsity_config is 'x', and has to be an object"),
        (quantized(**MODELOPT, exclude_modules=5), r"exclude_modules is 5, and has to be a list"),
        (quantized(**MODELOPT, exclude_modules=[None]), r"exclude_modules holds None, which is no name"),
        (quantized(**MIXED, quantized_layers=[1]), r"quantized_layers is \[1\], and has to be an object"),
        (quantized(**MIXED, quantized_layers={LONG: 3}), r"n+\.\.\.n+ is 3, and has to be an object"),
        (quantized(**MIXED, quantized_layers={"x": {"quant_algo": LONG}}), r"layer x has quant_algo 'n+\.\.\.n+'"),
        ({**LLAMA, "quantization_config": FP8, "architectures": 5}, r"(?i)architectures"),
        (
            {**LLAMA, "quantization_config": FP8, "architectures": [LONG]},
            r"has no n+\.\.\.n+ among its models",
        ),
        ({**LLAMA, "quantization_config": FP8, "hidden_size": float("nan")}, r"config\.json"),
        ({**LLAMA, "quantization_config": FP8, "hidden_size": HUGE}, r"config\.json"),
    ],
    ids=range(32),
)
def test_config(config: Any, expected: str, tmp_path: Path) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=expected) as caught:
        qcompile.load_checkpoint(tmp_path)
    assert len(str(caught.value)) < 1_500


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", r"hf_quant_config\.json holds no JSON object"),
        ("[" * 100_000, r"hf_quant_config\.json cannot be read: it is nested too deeply"),
        ('{"quantization": 5}', r"neither config\.json nor hf_quant_config\.json has a quant_algo"),
        ('{"quantization": {"quant_algo": {}}}', r"hf_quant_config\.json: quantization has quant_algo \{\}; known"),
        ('{"quantization": {"quant_algo": "FP8", "exclude_modules": "x"}}', r"exclude_modules is 'x'"),
    ],
    ids=range(5),
)
def test_hf_quant_config(content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "hf_quant_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=expected):
        qcompile.load_checkpoint(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="holds no weights"):
        qcompile.save_checkpoint(tmp_path, tmp_path / "new", progress=False)


@pytest.mark.parametrize(
    "size", [10**9, {"height": 2**31, "width": 8}, {"height": -1, "width": 8}, {"height": 8, "width": float("nan")}]
)
def test_images_of_no_size(size: Any, tmp_path: Path) -> None:
    content = {"image_processor_type": "ViTImageProcessor", "size": size}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match=r"preprocessor_config\.json: .* pixels a side"):
        load_preprocessor(IMAGES, str(tmp_path), "photos")
