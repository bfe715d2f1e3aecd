"""Independent readers load what is written, and Model Optimizer's own writer writes the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qcompile
from passes.formats import FP8, INT8
from passes.ir import DEQUANTIZE
from qcompile.checkpoint.write.save import save_checkpoint
from tests.qcompile.checkpoint.models import batch, read, same, save, tiny

SLOW = pytest.mark.slow


def dequantized(checkpoint: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> torch.Tensor:
    """A weight, by the operators of the IR, from the tensors of any format."""
    if f"{name}.weight_scale_inv" in checkpoint:
        scale = checkpoint[f"{name}.weight_scale_inv"]
        return DEQUANTIZE(checkpoint[f"{name}.weight"], scale, format="fp8_128x128", dtype=dtype)
    if f"{name}.weight_packed" in checkpoint:
        scale = 1 / checkpoint[f"{name}.weight_global_scale"].float()
        scale = DEQUANTIZE(checkpoint[f"{name}.weight_scale"], scale.reshape(()), format="fp8", dtype=torch.float32)
        return DEQUANTIZE(checkpoint[f"{name}.weight_packed"], scale, format="nvfp4", dtype=dtype)
    codes = checkpoint[f"{name}.weight"]
    fmt = INT8 if codes.dtype == INT8.storage else FP8
    return DEQUANTIZE(codes, checkpoint[f"{name}.weight_scale"], format=fmt.name, dtype=dtype)


def fake_quantized(model: Any, checkpoint: Path) -> Any:
    """`model` in place, with each weight that is quantized in `checkpoint` replaced by what its codes stand for."""
    tensors = read(checkpoint)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = dequantized(tensors, name, module.weight.dtype)
    return model


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=SLOW)])
@torch.no_grad()
def test_transformers_loads_block_fp8(tmp_path: Path, family: str) -> None:
    """On a CPU it dequantizes to bfloat16; right for sides that are multiples of 128."""
    source = save(tiny(family), tmp_path / "source")
    save_checkpoint(source, tmp_path / "out", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    ours = fake_quantized(transformers.AutoModelForCausalLM.from_pretrained(source), tmp_path / "out")
    expected, found = ours.state_dict(), theirs.state_dict()
    assert not [name for name, tensor in expected.items() if not same(tensor, found[name])]
    ids = batch()
    assert torch.equal(ours(**ids).logits, theirs(**ids).logits)


@torch.no_grad()
def test_transformers_loads_block_fp8_experts(tmp_path: Path) -> None:
    source = save(tiny("qwen3_moe", num_hidden_layers=1), tmp_path / "source")
    save_checkpoint(source, tmp_path / "out", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    tensors, experts = read(tmp_path / "out"), theirs.model.layers[0].mlp.experts
    for e in range(4):
        name = f"model.layers.0.mlp.experts.{e}"
        gate, up, down = (dequantized(tensors, f"{name}.{p}_proj", torch.bfloat16) for p in ("gate", "up", "down"))
        assert torch.equal(experts.gate_up_proj[e], torch.cat([gate, up])) and torch.equal(experts.down_proj[e], down)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", "nvfp4_weight_only"),
        ("qwen3", "fp8_per_channel_per_token"),
        ("llama", "int8_per_channel_per_token"),
        pytest.param("llama", "fp8_block", marks=SLOW),
        pytest.param("qwen3", "nvfp4_weight_only", marks=SLOW),
    ],
)
@torch.no_grad()
def test_compressed_tensors_loads_dense_models(tmp_path: Path, family: str, recipe: str) -> None:
    pytest.importorskip("compressed_tensors")
    source = save(tiny(family, torch.float32), tmp_path / "source")
    save_checkpoint(source, tmp_path / "out", format="compressed-tensors", recipe=recipe, progress=False)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config)
    tensors, checked = read(tmp_path / "out"), 0
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            if recipe == "fp8_block":
                scale = tensors[f"{name}.weight_scale"].float()
                mine = DEQUANTIZE(tensors[f"{name}.weight"], scale, format="fp8_128x128", dtype=torch.float32)
            else:
                mine = dequantized(tensors, name, torch.float32)
            if recipe == "nvfp4_weight_only":  # whose decompressor computes in bfloat16
                assert torch.equal(module.weight, mine.bfloat16().float())
            else:
                assert torch.equal(module.weight, mine)
            checked += 1
    assert checked == 14
    assert torch.isfinite(theirs(**batch()).logits).all()


GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
MODELOPT = [
    ("fp8", "FP8_DEFAULT_CFG"),
    ("fp8_per_channel_per_token", "FP8_PER_CHANNEL_PER_TOKEN_CFG"),
    pytest.param("nvfp4_fast", "NVFP4_DEFAULT_CFG", marks=SLOW),
]


@pytest.mark.everyday(1)
@pytest.mark.parametrize(("recipe", "theirs"), MODELOPT)
@pytest.mark.parametrize("family", ["qwen3", pytest.param("llama", marks=SLOW)])
def test_model_optimizer_writes_the_same(tmp_path: Path, family: str, recipe: str, theirs: str) -> None:
    """Same names, dtypes and shapes; codes and scales, too, as it computes in float32 here."""
    export = pytest.importorskip("modelopt.torch.export")
    mtq = pytest.importorskip("modelopt.torch.quantization")
    model, ids = tiny(family, torch.float32, num_hidden_layers=1), batch()
    rules = recipe if recipe != "fp8" else "fp8_gemm"
    program = qcompile.quantize(model, (), ids, recipe=rules, calibration=[ids], dtype=torch.float32, progress=False)
    save_checkpoint(program, tmp_path / "ours", format="modelopt", source=model, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mtq.quantize(model, getattr(mtq, theirs), lambda m: m(**ids))
        export.export_hf_checkpoint(model, dtype=torch.float32, export_dir=tmp_path / "theirs")
    ours, expected = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    assert {k: (t.dtype, t.shape) for k, t in ours.items()} == {k: (t.dtype, t.shape) for k, t in expected.items()}
    for name, tensor in expected.items():
        module, kind = name.rpartition(".")[::2]
        group = next((g for g in GROUPS if module.rpartition(".")[2] in g), ())
        if recipe == "fp8" and group and kind in ("weight", "weight_scale"):
            # the one thing that it does not share: vLLM would take the largest, and make codes anew
            scales = [expected[f"{module.rpartition('.')[0]}.{part}.weight_scale"] for part in group]
            assert torch.equal(ours[f"{module}.weight_scale"], torch.stack(scales).amax())
        elif kind == "input_scale":  # of activations, whose last bit is the order of sums
            assert torch.allclose(ours[name], tensor, rtol=1e-5)
        else:
            assert same(ours[name], tensor), name
    files = [json.loads((tmp_path / side / "hf_quant_config.json").read_text()) for side in ("ours", "theirs")]
    assert files[0]["quantization"] == files[1]["quantization"]
