"""Engines of both routes, built side by side: the same fused attentions and the same types of GEMMs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import qcompile
from qcompile.engine import EngineReport

pytest.importorskip("transformers")

from benchmarks import models
from benchmarks.models import LLAMA_TINY, SIGLIP_TINY, VIT_TINY, Example, with_layers

VIT_4 = partial(models.vit, with_layers(VIT_TINY, 4))
VIT = partial(models.vit, VIT_TINY)
LLAMA = partial(models.llama, LLAMA_TINY)
BERT = partial(models.bert, models.BERT_TINY)


def engines(example: Example, recipe: str, target: str, dtype: torch.dtype = torch.float16) -> list[EngineReport]:
    """The program of `example` by route="onnx" and by route="torch_tensorrt"."""
    program = example.quantized(recipe=recipe, dtype=dtype)
    build = partial(qcompile.build_engine, program, target=target, profiles=example.profiles, progress=False)
    return [build(route="onnx"), build(route="torch_tensorrt")]


@pytest.mark.parametrize(
    ("make", "recipe", "target", "attention_fp8", "gemms"),
    [
        (VIT_4, "fp8", "sm89", 4, {"fp8": 18}),
        (LLAMA, "fp8", "sm89", 2, {"fp8": 8, "half": 1}),
        (VIT_4, "nvfp4_fp8_attention", "sm120", 4, {"fp4": 17, "fp8": 1}),
        (LLAMA, "nvfp4_fp8_attention", "sm120", 2, {"fp4": 8, "half": 1}),
        (partial(VIT, dynamic=True), "fp8", "sm89", 2, {"fp8": 10}),
        (partial(LLAMA, dynamic=True), "fp8", "sm120", 2, {"fp8": 8, "half": 1}),
        (partial(BERT, dynamic=True), "fp8", "sm89", 2, {"fp8": 9}),
        (LLAMA, "int8", "sm89", 0, {"int8": 8, "half": 1}),
        (LLAMA, "fp8_per_channel_per_token", "sm89", 0, {"fp8": 8, "half": 1}),
        (LLAMA, "fp8_block", "sm89", 0, {"fp8": 8, "half": 1}),
        (LLAMA, "nvfp4_weight_only", "sm120", 0, {"half": 15}),
        (partial(LLAMA, dynamic=True), "int8", "sm89", 0, {"int8": 8, "half": 1}),
        (LLAMA, "fp8_qkvo-nvfp4_mlp", "sm120", 2, {"fp8": 4, "fp4": 4, "half": 1}),
        (partial(models.siglip, SIGLIP_TINY), "nvfp4", "sm120", 0, {"fp4": 8, "fp8": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_routes_fuse_the_same(
    make: Any, recipe: str, target: str, attention_fp8: int, gemms: dict[str, int]
) -> None:
    onnx, direct = engines(make(), recipe, target)
    assert direct.attention == onnx.attention
    assert direct.attention.fp8 == attention_fp8
    assert direct.gemms == onnx.gemms
    assert {kind: count for kind, count in direct.gemms.items() if count} == gemms
    assert direct.precisions == onnx.precisions
    assert sorted(direct.not_low_precision) == sorted(onnx.not_low_precision)
    assert direct.kernels <= onnx.kernels


def test_bfloat16() -> None:
    onnx, direct = engines(LLAMA(), "fp8", "sm89", torch.bfloat16)
    assert direct.attention == onnx.attention and direct.attention.fp8 == 2
    assert direct.gemms == onnx.gemms


def mixtral() -> Example:
    import transformers

    config = transformers.MixtralConfig(
        num_hidden_layers=1,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        vocab_size=200,
        num_local_experts=4,
    )
    ids = {"input_ids": torch.randint(0, 200, (2, 32))}
    return Example(models.random_model(lambda: transformers.MixtralForCausalLM(config)), (), ids, [ids])


def test_a_mixture_of_experts() -> None:
    onnx, direct = engines(mixtral(), "nvfp4_fp8_attention", "sm120")
    assert direct.attention == onnx.attention and direct.attention.fp8 == 1
    assert direct.gemms == onnx.gemms and direct.gemms["fp4"] == 4
    assert direct.precisions == onnx.precisions


def test_a_plain_program_that_nobody_has_decomposed() -> None:
    layer = torch.nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, norm_first=True).eval().half()
    program = torch.export.export(layer, (torch.randn(2, 40, 64).half(),))
    build = partial(qcompile.build_engine, program, target="sm89", progress=False)
    onnx, direct = build(route="onnx"), build(route="torch_tensorrt")
    assert direct.attention == onnx.attention and direct.attention.fused == 1
    assert direct.gemms == onnx.gemms and direct.kernels <= onnx.kernels


def test_expectations_and_the_file(tmp_path: Any) -> None:
    program = LLAMA().quantized(recipe="fp8", dtype=torch.float16)
    build = partial(
        qcompile.build_engine, program, tmp_path / "m.engine", target="sm89", route="torch_tensorrt", progress=False
    )
    with pytest.raises(qcompile.QCompileError, match=r"gemm_fp8: at least 9 wanted, 8 found\n.*lm_head"):
        build(expect={"gemm_fp8": 9})
    assert not list(tmp_path.iterdir())
    report = build(expect={"gemm_fp8": 8, "attention_fp8": 2})
    assert (tmp_path / "m.engine").stat().st_size == report.bytes
