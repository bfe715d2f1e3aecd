"""Reading quantized checkpoints; transformers' own loader is the judge where facts allow it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile.capture import capture
from qcompile.checkpoint.load import is_quantized_checkpoint, load_checkpoint
from qcompile.checkpoint.read.fused_experts import StackedLinears
from qcompile.frontends.quantized import is_quantized
from qcompile.schemes.layer import QuantizedLinear, QuantizedWeight
from qcompile.schemes.scheme import FP8_BLOCK, FP8_CHANNEL_TOKEN, FP8_TENSOR, NVFP4_W4A4, Scheme
from qcompile.source import load_source

transformers = pytest.importorskip("transformers")

from tests.qcompile.checkpoint.formats.support import assert_same_bits  # noqa: E402
from tests.qcompile.frontends.tiny import IDS, edit, edit_config, tiny_model, write_checkpoint  # noqa: E402

MODELS = ["llama", "qwen3", "qwen3_moe"]


def layers(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def weight_only(model: torch.nn.Module) -> torch.nn.Module:
    for layer in layers(model).values():
        layer.scheme = dataclasses.replace(layer.scheme, input=None)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


def assert_reads_like(model: torch.nn.Module, judge: torch.nn.Module, *, equal: bool) -> None:
    """The same dequantized weights, floats and buffers, bit by bit, and without quantized inputs the same logits."""
    state = dict(judge.named_parameters()) | dict(judge.named_buffers())
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    quantized = layers(model)
    assert quantized
    for name, wanted in state.items():
        layer = quantized.get(name) or quantized.get(name.removesuffix(".weight"))
        tensor = found[name] if layer is None else layer._dequantized(wanted.dtype)
        assert tensor.dtype == wanted.dtype and tensor.equal(wanted), name
    a, b = logits(weight_only(model)), logits(judge)
    if equal:
        assert a.equal(b)
    else:
        assert_close(a, b, 1e-5)  # experts are summed in another order


@pytest.mark.parametrize("kind", MODELS)
def test_block_fp8_is_what_transformers_dequantizes(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    write_checkpoint(tmp_path, tiny_model(kind), "fp8", FP8_BLOCK, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    judge = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    assert_reads_like(load_checkpoint(tmp_path), judge, equal="moe" not in kind)


def test_a_model_in_bfloat16_stays_so(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    write_checkpoint(tmp_path, tiny_model("llama", torch.bfloat16), "fp8", FP8_BLOCK)
    judge = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    assert_reads_like(load_checkpoint(tmp_path), judge, equal=True)


def exact_in_bfloat16(name: str, weight: QuantizedWeight) -> QuantizedWeight:
    """The judge multiplies FP4 in bfloat16, which is exact under a power of two."""
    if weight.global_scale is None:
        return weight
    return dataclasses.replace(weight, global_scale=torch.exp2(torch.log2(weight.global_scale).round()))


@pytest.mark.parametrize("scheme", [FP8_TENSOR, FP8_CHANNEL_TOKEN, NVFP4_W4A4], ids=["tensor", "channel", "nvfp4"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_compressed_tensors_is_what_transformers_dequantizes(kind: str, scheme: Scheme, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    written = write_checkpoint(tmp_path, tiny_model(kind), "compressed-tensors", scheme, change=exact_in_bfloat16)
    judge = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    model = load_checkpoint(tmp_path)
    found = layers(model)
    assert found.keys() == written.keys() and {layer.scheme for layer in found.values()} == {scheme}
    assert_reads_like(model, judge, equal=True)


@pytest.mark.everyday(5)
@pytest.mark.parametrize("kind", [*MODELS, "mixtral"])
@pytest.mark.parametrize("fmt, scheme", [("fp8", FP8_BLOCK), ("modelopt", FP8_TENSOR), ("modelopt", NVFP4_W4A4)])
def test_codes_and_scales_are_taken_as_they_are(kind: str, fmt: str, scheme: Scheme, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, tiny_model(kind, torch.bfloat16), fmt, scheme)
    model = load_checkpoint(tmp_path)
    found = layers(model)
    for name, weight in written.items():
        if "expert" in name:
            continue
        layer = found[name]
        scale = layer.weight_block_scale if scheme.weight.scale else layer.weight_scale
        assert_same_bits(layer.codes.detach(), weight.codes)
        assert_same_bits(scale.detach(), weight.scale)
    assert_experts(model, written)


def assert_experts(model: torch.nn.Module, written: dict[str, QuantizedWeight]) -> None:
    """Fused experts dequantize to those of the files, one by one."""
    names = [name for name, _ in model.named_modules() if name.endswith(("gate_up_proj", "experts.down_proj"))]
    assert bool(names) == any("experts" in name for name in written)
    for name in names:
        parts = ("gate_proj", "up_proj", "w1", "w3") if name.endswith("gate_up_proj") else ("down_proj", "w2")
        prefix = name.rpartition(".")[0]
        fused = torch.cat([w._dequantized(torch.float32) for w in layers(model.get_submodule(name)).values()], 1)
        for expert in range(fused.shape[0]):
            hub = [
                f"{p}.{expert}.{part}" for p in (prefix, prefix.replace("mlp", "block_sparse_moe")) for part in parts
            ]
            single = [QuantizedLinear(written[n])._dequantized(torch.float32) for n in hub if n in written]
            assert fused[expert].equal(torch.cat(single))


def scaled(name: str, weight: QuantizedWeight, *, parts: bool) -> QuantizedWeight:
    """With scales of its own for each expert, and if `parts` for gate and up, and another input scale."""
    if "experts" not in name:
        return weight
    factor = 1.0 + int(name.split(".")[-2]) / 8 + (0.5 if parts and name.endswith("up_proj") else 0)
    key = "scale" if weight.global_scale is None else "global_scale"
    values = {key: torch.tensor(1e-3 * factor)}
    if weight.input_scale is not None:
        values["input_scale"] = torch.tensor(1e-2 * factor)
    return dataclasses.replace(weight, **values)


@pytest.mark.parametrize("scheme", [FP8_TENSOR, NVFP4_W4A4, Scheme(NVFP4_W4A4.weight)], ids=["fp8", "nvfp4", "w4a16"])
@pytest.mark.parametrize("parts", [False, True], ids=["experts", "gate-and-up"])
def test_experts_with_scales_of_their_own(
    scheme: Scheme, parts: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(name: str, weight: QuantizedWeight) -> QuantizedWeight:
        return scaled(name, weight, parts=parts)

    written = write_checkpoint(tmp_path, tiny_model("qwen3_moe"), "modelopt", scheme, change=change)
    with caplog.at_level(logging.INFO, logger="qcompile"):
        model = load_checkpoint(tmp_path)
    found = layers(model)
    assert_experts(model, written)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    if parts and scheme is not FP8_TENSOR:  # a global scale is one for each matrix
        assert isinstance(model.get_submodule(name), StackedLinears)
        name += ".parts.1"
    fused = found[name]
    scale = fused.weight_scale if scheme is FP8_TENSOR else fused.weight_global_scale
    assert tuple(scale.shape) == ((4, 256, 1) if fused.codes.shape[1] == 256 and parts else (4, 1, 1))
    if scheme.input is None:
        assert "input scales" not in caplog.text
        return
    assert "model.layers.0.mlp.experts.gate_up_proj: the input scales of its experts lie between" in caplog.text
    used = fused.input_scale if scheme is FP8_TENSOR else fused.input_global_scale
    inputs = [
        w.input_scale
        for n, w in written.items()
        if n.startswith("model.layers.0") and n.endswith(("gate_proj", "up_proj"))
    ]
    torch.testing.assert_close(used, torch.stack([scale for scale in inputs if scale is not None]).amax())
    assert torch.isfinite(logits(model)).all()


def test_blocks_that_a_seam_would_cut_stay_apart(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, tiny_model("qwen3_moe", moe_intermediate_size=96), "fp8", FP8_BLOCK)
    model = load_checkpoint(tmp_path)
    gate_up = model.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
    assert isinstance(gate_up, StackedLinears) and torch.isfinite(logits(model)).all()
    x = torch.randn(1, 5, 128)
    experts = [[written[f"model.layers.0.mlp.experts.{e}.{p}_proj"] for p in ("gate", "up")] for e in range(4)]
    wanted = torch.stack([torch.cat([QuantizedLinear(w)(x[0]) for w in pair], -1) for pair in experts])
    torch.testing.assert_close(gate_up(x), wanted)


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embedding(tied: bool, tmp_path: Path) -> None:
    original = tiny_model("llama", tie_word_embeddings=tied)
    write_checkpoint(tmp_path, original, "modelopt", FP8_TENSOR)
    model: Any = load_checkpoint(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.lm_head.weight.equal(original.lm_head.weight)


def test_a_head_with_codes_of_its_own_is_not_tied(tmp_path: Path) -> None:
    original = tiny_model("llama", vocab_size=128)
    write_checkpoint(tmp_path, original, "compressed-tensors", FP8_TENSOR, head=True)
    edit_config(tmp_path, lambda config: config.update(tie_word_embeddings=True))
    model: Any = load_checkpoint(tmp_path)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.model.embed_tokens.weight.equal(original.model.embed_tokens.weight)
    assert torch.isfinite(logits(model)).all()


def test_the_part_of_a_model_that_the_configuration_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, tiny_model("llama"), "modelopt", FP8_TENSOR)
    whole: Any = load_checkpoint(tmp_path)
    edit_config(tmp_path, lambda config: config.update(architectures=["LlamaModel"]))
    with caplog.at_level(logging.INFO, logger="qcompile"), torch.no_grad():
        hidden = load_checkpoint(tmp_path)(input_ids=IDS).last_hidden_state
        assert hidden.equal(whole.model(input_ids=IDS).last_hidden_state)
    assert "the model has no place for lm_head.weight" in caplog.text


def test_biases_are_loaded(tmp_path: Path) -> None:
    original = tiny_model("llama", attention_bias=True)
    write_checkpoint(tmp_path, original, "modelopt", FP8_TENSOR)
    model: Any = load_checkpoint(tmp_path)
    found, wanted = model.model.layers[0].self_attn.q_proj.bias, original.model.layers[0].self_attn.q_proj.bias
    assert wanted.any() and found.equal(wanted)


def test_what_is_not_quantized_stays_a_linear_layer(tmp_path: Path) -> None:
    original = tiny_model("qwen3_moe")

    def scheme(name: str) -> Scheme | None:
        return None if "layers.1.mlp" in name or "o_proj" in name else NVFP4_W4A4

    write_checkpoint(tmp_path, original, "modelopt", scheme)
    model: Any = load_checkpoint(tmp_path)
    assert isinstance(model.model.layers[0].self_attn.o_proj, torch.nn.Linear)
    assert model.model.layers[1].mlp.experts.down_proj.equal(original.model.layers[1].mlp.experts.down_proj)
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, QuantizedLinear)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("fmt", ["modelopt", "compressed-tensors"])
def test_key_value_caches_are_quantized(fmt: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "with", tiny_model("qwen3"), fmt, FP8_TENSOR, kv=(0.05, 0.01))
    write_checkpoint(tmp_path / "without", tiny_model("qwen3"), fmt, FP8_TENSOR)
    model, plain = load_checkpoint(tmp_path / "with"), load_checkpoint(tmp_path / "without")
    assert float(model.get_submodule("model.layers.1.self_attn").k_scale) == pytest.approx(0.05)
    difference = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 1e-4 < difference < 0.2
    graph = capture(model, (), {"input_ids": IDS}).graph
    attentions = [n for n in graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert len(attentions) == 2
    for node in attentions:
        assert ["dequantize" in str(operand.target) for operand in node.args[:3]] == [False, True, True]


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    "kind, fmt, scheme",
    [
        ("llama", "fp8", FP8_BLOCK),
        ("qwen3_moe", "compressed-tensors", NVFP4_W4A4),
        ("qwen3_moe", "modelopt", FP8_TENSOR),
    ],
)
def test_a_captured_program_computes_the_same(kind: str, fmt: str, scheme: Scheme, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_model(kind, torch.bfloat16), fmt, scheme)
    model = load_checkpoint(tmp_path)
    program = capture(model, (), {"input_ids": IDS})
    assert program.module()(input_ids=IDS).logits.equal(logits(model))
    assert not [p for p in model.parameters() if p.is_meta]


def test_a_directory_is_a_source(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_model("llama"), "modelopt", FP8_TENSOR)
    assert is_quantized_checkpoint(tmp_path)
    source = load_source(str(tmp_path), sequence=8)
    assert is_quantized(source.model) and source.program is None
    assert source.inputs["input_ids"].shape == (1, 8)


def test_only_the_file_beside_the_config_says_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_model("llama"), "modelopt", FP8_TENSOR)
    edit_config(tmp_path, lambda config: config.pop("quantization_config"))
    assert is_quantized_checkpoint(tmp_path) and layers(load_checkpoint(tmp_path))


def test_tensors_that_the_model_has_no_place_for_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, tiny_model("llama"), "modelopt", FP8_TENSOR)
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    with caplog.at_level(logging.INFO, logger="qcompile"):
        load_checkpoint(tmp_path)
    assert "the model has no place for model.extra.weight" in caplog.text
