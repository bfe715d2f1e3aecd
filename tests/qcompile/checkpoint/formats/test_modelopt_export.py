"""Model Optimizer's own export is the judge: read and written again, nothing may differ, keys and configs included."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from passes.formats import INT4_128, MXFP8
from passes.ir import dynamic_quantize, quantize
from qcompile.checkpoint.formats import FORMATS, Contents, SchemeReader, reader_of
from qcompile.schemes.scheme import FP8_CHANNEL_TOKEN, FP8_TENSOR, NVFP4_W4A4, Scheme
from tests.qcompile.checkpoint.formats.support import BLOCK_WEIGHT_ONLY, NVFP4_WEIGHT_ONLY, assert_same_bits

pytest.importorskip("modelopt.torch.export")
transformers = pytest.importorskip("transformers")

ATTENTION, MLP = r"self_attn\.", r"mlp\."
SCHEMES: dict[str, dict[str, Scheme]] = {
    "fp8": {"": FP8_TENSOR},
    "fp8_kv": {"": FP8_TENSOR},
    "fp8_tied": {"": FP8_TENSOR},
    "fp8_per_channel": {"": FP8_CHANNEL_TOKEN},
    "fp8_blocks": {"": BLOCK_WEIGHT_ONLY},
    "fp8_blocks_ragged": {"": BLOCK_WEIGHT_ONLY},
    "nvfp4": {"": NVFP4_W4A4},
    "nvfp4_weights": {"": NVFP4_WEIGHT_ONLY},
    "nvfp4_mlp": {MLP: NVFP4_W4A4},
    "mixed": {ATTENTION: FP8_TENSOR, MLP: NVFP4_W4A4},
    "mixed_blocks": {ATTENTION: BLOCK_WEIGHT_ONLY, MLP: NVFP4_W4A4},
    "mixed_per_channel": {ATTENTION: FP8_CHANNEL_TOKEN, MLP: NVFP4_WEIGHT_ONLY},
    "int4_blocks": {"": Scheme(INT4_128)},
    "mixed_int4_blocks": {ATTENTION: FP8_TENSOR, MLP: Scheme(INT4_128)},
    "mxfp8": {"": Scheme(MXFP8, MXFP8)},
    "nvfp4_moe": {"": NVFP4_W4A4},
    "mixed_moe": {ATTENTION: FP8_TENSOR, MLP: NVFP4_W4A4},
}


@dataclass
class Export:
    """What Model Optimizer wrote, and the weights it started from (names of the hub; the dense ones)."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    hf_quant_config: dict[str, Any]
    floats: dict[str, torch.Tensor]
    reader: SchemeReader

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every module with a weight of two axes -> `(N, K)`."""
        result = {}
        for key, tensor in self.tensors.items():
            if key.endswith(".weight") and tensor.ndim == 2:
                n, k = self.floats[key].shape if key in self.floats else tensor.shape  # experts are fused in `floats`
                packed = key not in self.floats and tensor.dtype == torch.uint8
                result[key.removesuffix(".weight")] = (n, 2 * k if packed else k)
        return result


def recipe(case: str) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    if case.startswith("mixed"):
        rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        attention, mlp = {
            "mixed_blocks": (mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG, mtq.NVFP4_DEFAULT_CFG),
            "mixed_int4_blocks": (mtq.FP8_DEFAULT_CFG, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG),
            "mixed_per_channel": (mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, mtq.W4A16_NVFP4_CFG),
        }.get(case, (mtq.FP8_DEFAULT_CFG, mtq.NVFP4_DEFAULT_CFG))
        for pattern, config in (("*self_attn*", attention), ("*mlp*", mlp)):
            for rule in config["quant_cfg"]:
                if rule.get("cfg") and rule["quantizer_name"] in ("*weight_quantizer", "*input_quantizer"):
                    rules.append({**rule, "quantizer_name": pattern + rule["quantizer_name"][1:]})
        rules += [{"quantizer_name": name, "enable": False} for name in ("*lm_head*", "*mlp.gate.*")]
        return {"quant_cfg": rules, "algorithm": "max"}
    if case == "fp8_kv":
        from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

        return dict(update_quant_cfg_with_kv_cache_quant(mtq.FP8_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"]))
    configs = {
        "fp8": mtq.FP8_DEFAULT_CFG,
        "fp8_tied": mtq.FP8_DEFAULT_CFG,
        "fp8_per_channel": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
        "fp8_blocks": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
        "fp8_blocks_ragged": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
        "nvfp4": mtq.NVFP4_DEFAULT_CFG,
        "nvfp4_moe": mtq.NVFP4_DEFAULT_CFG,
        "nvfp4_weights": mtq.W4A16_NVFP4_CFG,
        "nvfp4_mlp": mtq.NVFP4_MLP_ONLY_CFG,
        "mxfp8": mtq.MXFP8_DEFAULT_CFG,
        "int4_blocks": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
    }
    return dict(configs[case])


def model_for(case: str) -> Any:
    width, heads = (256, 2) if "blocks" in case else (64, 4)
    ragged = case.endswith("ragged")  # k and v have 64 rows
    common = dict(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4 if ragged else heads,
        num_key_value_heads=1 if ragged else 2,
        vocab_size=96,
    )
    if case.endswith("moe"):
        config = transformers.Qwen3MoeConfig(
            **common,
            head_dim=16,
            intermediate_size=128,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            architectures=["Qwen3MoeForCausalLM"],
        )
        return transformers.Qwen3MoeForCausalLM(config)
    config = transformers.LlamaConfig(
        **common,
        intermediate_size=2 * width,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=case == "fp8_tied",
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=SCHEMES)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Export]:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    case: str = request.param
    directory: Path = tmp_path_factory.mktemp(case)
    torch.manual_seed(0)
    model = model_for(case).eval()
    floats = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 96, (2, 16))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mtq.quantize(model, recipe(case), lambda m: m(input_ids=ids))
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=directory)
    config = json.loads((directory / "config.json").read_text())
    return case, Export(
        safetensors.torch.load_file(directory / "model.safetensors"),
        config["quantization_config"],
        json.loads((directory / "hf_quant_config.json").read_text()),
        floats,
        reader_of(config, directory),
    )


def contents_of(export: Export) -> Contents:
    found = {name: export.reader.scheme(name) for name in export.linears}
    return Contents(
        {name: scheme for name, scheme in found.items() if scheme is not None},
        [name for name, scheme in found.items() if scheme is None],
        export.reader.kv_cache,
        {} if "lm_head.weight" in export.tensors else {"lm_head": "model.embed_tokens"},
    )


@pytest.mark.everyday(6)
def test_schemes_are_recognized(export: tuple[str, Export]) -> None:
    case, written = export
    rules = SCHEMES[case]
    for name in written.linears:
        floating = re.search(r"lm_head|embed_tokens|mlp\.gate$", name)
        expected = None if floating else next((s for pattern, s in rules.items() if re.search(pattern, name)), None)
        assert written.reader.scheme(name) == expected, name
    assert written.reader.kv_cache == (case == "fp8_kv")


def test_configuration_is_written_key_for_key(export: tuple[str, Export]) -> None:
    _, written = export
    files = FORMATS["modelopt"].files(contents_of(written))
    assert files == {
        "config.json": {"quantization_config": written.config},
        "hf_quant_config.json": written.hf_quant_config,
    }
    # in the same order, too: layers of mixed precision are listed as the contents list them
    assert list(files["config.json"]["quantization_config"]) == list(written.config)
    assert list(files["hf_quant_config.json"]["quantization"]) == list(written.hf_quant_config["quantization"])


def test_tensors_are_written_as_they_were_read(export: tuple[str, Export]) -> None:
    _, written = export
    fmt, contents = FORMATS["modelopt"], contents_of(written)
    fmt.check(contents, written.linears)
    again: dict[str, torch.Tensor] = {}
    for name, scheme in contents.schemes.items():
        weight = written.reader.weight(name, scheme, written.tensors.__getitem__, written.linears[name])
        again |= fmt.tensors(name, weight)
    for i in range(2):
        attention = f"model.layers.{i}.self_attn"
        scales = written.reader.kv_scales(attention, written.tensors.__getitem__)
        assert (scales is not None) == contents.kv_cache
        if scales is not None:
            again |= fmt.kv_tensors(attention, *scales)
    for name, tensor in again.items():
        assert_same_bits(tensor, written.tensors[name])
    left = {name for name in written.tensors if name not in again}
    assert left == {f"{n}.weight" for n in contents.unquantized} | {n for n in left if "norm" in n}


def test_codes_are_those_of_the_ir(export: tuple[str, Export]) -> None:
    """In fp32, the weights it started from and the scales it wrote give its codes, bit for bit."""
    _, written = export
    for name, scheme in contents_of(written).schemes.items():
        if f"{name}.weight" not in written.floats:
            continue  # experts, which are fused in memory
        weight = written.reader.weight(name, scheme, written.tensors.__getitem__, written.linears[name])
        if weight.global_scale is None:
            codes = quantize(written.floats[f"{name}.weight"], weight.scale, format=scheme.weight.name)
        else:
            codes, scale = dynamic_quantize(written.floats[f"{name}.weight"], weight.global_scale, format="nvfp4")
            assert_same_bits(scale, weight.scale)
        assert_same_bits(codes, weight.codes)
