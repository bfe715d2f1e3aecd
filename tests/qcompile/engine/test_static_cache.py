"""Engines of the real builder over a static FP8 cache: one fused attention a layer, which reads the codes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.decoders import Cache
from qcompile.quantization.quantize import quantize

pytest.importorskip("tensorrt_rtx")
transformers = pytest.importorskip("transformers")
LENGTH, LAYERS, KEPT, WIDTH = 512, 2, 2, 64


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=KEPT, head_dim=WIDTH, max_position_embeddings=LENGTH,
    )  # fmt: skip
    program = quantize(
        transformers.LlamaForCausalLM(config).eval(),
        recipe="fp8+fp8_kv",
        calibration=[{"input_ids": torch.randint(0, 64, (1, 16))}],
        cache=Cache("static", length=LENGTH),
        progress=False,
    )
    path = tmp_path_factory.mktemp("static") / "m.onnx"
    qcompile.export_onnx(program, path, target="tensorrt")
    return path


def _caches(tensors: Iterable[Any]) -> list[Any]:
    """The tensors that are keys or values of all positions, in whatever form."""
    return [tensor for tensor in tensors if sorted(tensor.shape[-2:]) == [WIDTH, LENGTH]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "tokens"),
    [("sm89", 1), ("sm120", 1), ("sm89", 32), ("sm120", 96)],
)
def test_attention_reads_the_codes_and_only_the_append_copies_a_cache(file: Path, target: str, tokens: int) -> None:
    report = qcompile.build_engine(
        file,
        target=target,
        profiles={"batch": (1, 1, 1), "sequence": (tokens,) * 3},
        expect={"attention_fp8": LAYERS, "gemm_fp8": 4 * LAYERS},
        progress=False,
    )
    attention = [layer for layer in report.layers if "_mha_" in layer.name]
    assert len(attention) == LAYERS
    for layer in attention:  # keys and values once, not for each head of queries
        assert [(t.datatype, torch.Size(t.shape).numel()) for t in _caches(layer.inputs)] == [
            ("FP8", LENGTH * WIDTH * KEPT)
        ] * 2
    writes = [layer for layer in report.layers if _caches(layer.outputs)]
    assert len(writes) == LAYERS
    for layer in writes:
        assert any(tensor.name.startswith("present.") for tensor in layer.outputs)
        assert {tensor.datatype for tensor in _caches(layer.outputs)} == {"FP8"}
    assert report.kernels <= 12 * LAYERS  # 9 without a cache, the append, queries, and the order of the heads
