"""Checkpoints that Model Optimizer itself exported, against the fake-quantized modules that it exported them from."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from passes.formats import NVFP4
from qcompile.checkpoint.load import load_checkpoint
from qcompile.schemes.layer import QuantizedLinear

pytest.importorskip("modelopt.torch.export")
pytest.importorskip("transformers")

from tests.qcompile.frontends.tiny import IDS, tiny_model


@dataclass
class Case:
    """A model of ours, that of Model Optimizer, and what went into and came out of each of its linear layers."""

    model: Any
    judge: Any
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]]
    logits: torch.Tensor


def config_of(name: str, kv: bool) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant

    config: dict[str, Any] = copy.deepcopy(getattr(mtq, name))
    return dict(update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])) if kv else config


@torch.no_grad()
def exported(directory: Path, kind: str, name: str, *, kv: bool = False) -> Case:
    """Calibrate on other tokens than those that are compared; NVFP4 modules run on CUDA only, so they are not run."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    # it writes one number for a weight of one block
    sides = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4} if "2D" in name else {}
    judge, seen = tiny_model(kind, **sides), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.quantize(judge, config_of(name, kv), lambda m: m(input_ids=(IDS + 5) % 96))

        def keep(path: str) -> Any:
            return lambda module, args, result: seen.update({path: (args[0], result)})

        logits = torch.empty(0)
        if "NVFP4" not in name:
            hooks = [
                module.register_forward_hook(keep(path))
                for path, module in judge.named_modules()
                if path.endswith("_proj")
            ]
            logits = judge(input_ids=IDS).logits
            for hook in hooks:
                hook.remove()
        original = copy.deepcopy(judge)
        export_hf_checkpoint(judge, dtype=torch.float32, export_dir=directory)
    return Case(load_checkpoint(directory), original, seen, logits)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


def judged_fp8(stored: dict[str, torch.Tensor], hub: str) -> torch.Tensor:
    """What Model Optimizer's own class dequantizes."""
    from modelopt.torch.quantization.qtensor import FP8QTensor

    codes, scale = stored[f"{hub}.weight"], stored[f"{hub}.weight_scale"]
    if scale.ndim == 1:
        scale = scale[:, None]
    if scale.ndim > 2:  # [N / 128, 1, K / 128, 1]
        scale = scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
    result: torch.Tensor = FP8QTensor(codes.shape, torch.float32, codes).dequantize(torch.float32, scale=scale)
    return result


@pytest.mark.parametrize(
    "kind, name, kv",
    [
        ("llama", "FP8_DEFAULT_CFG", True),
        ("qwen3", "FP8_PER_CHANNEL_PER_TOKEN_CFG", False),
        ("llama", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", False),
    ],
)
@torch.no_grad()
def test_every_layer_computes_the_same(kind: str, name: str, kv: bool, tmp_path: Path) -> None:
    case = exported(tmp_path, kind, name, kv=kv)
    layers = {n: m for n, m in case.model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(layers) == 14
    stored = load_file(tmp_path / "model.safetensors")
    for path, layer in layers.items():
        module = case.judge.get_submodule(path)
        found = layer._dequantized(torch.float32)
        assert found.equal(judged_fp8(stored, path)), path
        # its fake quantizer multiplies with 448 / amax where its export divides by amax / 448: a tie may fall elsewhere
        same = torch.isclose(found, module.weight_quantizer(module.weight), rtol=3e-7, atol=0)
        assert same.float().mean() > 0.9999
        x, wanted = case.seen[path]
        assert_close(layer(x), wanted, 2e-3)
    assert_close(case.model(input_ids=IDS).logits, case.logits, 0.02)  # a tie goes on through all layers


@torch.no_grad()
def test_experts_compute_the_same(tmp_path: Path) -> None:
    case = exported(tmp_path, "qwen3_moe", "FP8_DEFAULT_CFG")
    assert isinstance(case.model.model.layers[0].mlp.experts.gate_up_proj, QuantizedLinear)
    assert_close(case.model(input_ids=IDS).logits, case.logits, 1e-5)


@pytest.mark.parametrize("kind, kv", [("llama", True), ("qwen3_moe", False)])
@torch.no_grad()
def test_nvfp4_weights_are_what_its_own_class_dequantizes(kind: str, kv: bool, tmp_path: Path) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    case = exported(tmp_path, kind, "NVFP4_DEFAULT_CFG", kv=kv)
    stored = load_file(tmp_path / "model.safetensors")

    def judged(hub: str) -> torch.Tensor:
        codes = stored[f"{hub}.weight"]
        held = NVFP4QTensor((codes.shape[0], codes.shape[1] * 2), torch.float32, codes)
        result: torch.Tensor = held.dequantize(
            torch.float32,
            scale=stored[f"{hub}.weight_scale"],
            double_scale=stored[f"{hub}.weight_scale_2"],
            block_sizes={-1: 16},
        )
        return result

    layers = {n: m for n, m in case.model.named_modules() if isinstance(m, QuantizedLinear)}
    for path, layer in layers.items():
        assert layer.scheme.weight is NVFP4 and layer.scheme.input is NVFP4
        found = layer._dequantized(torch.float32)
        if found.ndim == 2:
            assert found.equal(judged(path))
            continue
        owner, _, name = path.rpartition(".")
        parts = ["gate_proj", "up_proj"] if name == "gate_up_proj" else ["down_proj"]
        for expert in range(4):
            assert found[expert].equal(torch.cat([judged(f"{owner}.{expert}.{part}") for part in parts]))
    assert hasattr(case.model.model.layers[0].self_attn, "k_scale") == kv
    assert torch.isfinite(case.model(input_ids=IDS).logits).all()
