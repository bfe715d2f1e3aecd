"""What one more block of a decoder costs: Llama, Phi3 with its packed layers, Qwen3 with norms of queries and keys."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

import qcompile
from benchmarks.models import random_model

pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")

BARS = {"llama": 9, "phi3": 9, "qwen3": 10}


def kernels(kind: str, layers: int, folder: Path, targets: tuple[str, ...]) -> list[int]:
    config = transformers.CONFIG_MAPPING[kind](
        num_hidden_layers=layers,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        vocab_size=200,
        max_position_embeddings=64,
        use_cache=False,
        pad_token_id=0,
    )
    model = random_model(partial(transformers.AutoModel.from_config, config))
    batch = {"input_ids": torch.randint(5, 190, (1, 48))}
    program = qcompile.quantize(model, (), batch, calibration=[batch], progress=False)
    qcompile.export_onnx(program, folder / "m.onnx")
    engines = [qcompile.build_engine(folder / "m.onnx", target=target, progress=False) for target in targets]
    assert all(engine.attention.fp8 == engine.attention.total == layers for engine in engines)
    return [engine.kernels for engine in engines]


@pytest.mark.everyday(1)
@pytest.mark.parametrize("kind", BARS)
def test_kernels_of_a_further_block(kind: str, tmp_path: Path) -> None:
    two, three = (kernels(kind, layers, tmp_path, ("sm89", "sm120")) for layers in (2, 3))
    assert [more - fewer for more, fewer in zip(three, two, strict=True)] == [BARS[kind]] * 2
