"""One large export in a process of its own, so that its peak memory is its own; large_model.py starts these.

`python -m benchmarks.large_worker {llama,embedding} RECIPE DTYPE OUTPUT` prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import onnxscript.optimizer  # noqa: F401  # before the first figure, as torch.onnx imports it
import torch
import transformers

import qcompile
from benchmarks.export_worker import peak_mb

_TOKENS = 32


def llama(dtype: torch.dtype) -> torch.nn.Module:
    """Llama-2-7B's blocks, five of them, and a smaller vocabulary: 1.2 G parameters, 1.0 G of them quantized."""
    config = transformers.LlamaConfig(
        num_hidden_layers=5,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        vocab_size=24000,
        use_cache=False,
        dtype=dtype,
    )
    return make(lambda: transformers.LlamaForCausalLM(config), dtype)


class Embedding(torch.nn.Module):
    """A table of 2.46 GB, larger than a protobuf message may be, and one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(600_000, 2048)
        self.up = torch.nn.Linear(2048, 2048)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.up(self.embed_tokens(input_ids))
        return result


def make(build: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The model with weights in `dtype` from the start: a float32 model on the way would set the peak."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model: torch.nn.Module = build().eval()
    finally:
        torch.set_default_dtype(before)
    return model


def parses(path: Path) -> bool:
    """Whether TensorRT's parser takes the file."""
    import tensorrt_rtx as trt

    log = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(log).create_network(0)  # strongly typed, as every network of TensorRT-RTX
    return bool(trt.OnnxParser(network, log).parse_from_file(str(path)))


def main(name: str, recipe: str, dtype: str, output: str) -> None:
    imports = peak_mb()
    wanted = getattr(torch, dtype)
    model = llama(wanted) if name == "llama" else make(Embedding, wanted)
    size = sum(parameter.nbytes for parameter in model.parameters())
    with_model = peak_mb()
    ids = torch.randint(0, 1000, (1, _TOKENS))
    start = time.perf_counter()
    program = qcompile.quantize(model, (), {"input_ids": ids}, recipe=recipe, calibration=[ids], progress=False)
    quantized, after_quantize = time.perf_counter(), peak_mb()
    report = qcompile.export_onnx(program, output)
    exported, peak = time.perf_counter(), peak_mb()
    assert report.checks and all(check.passed for check in report.checks)
    measured = {
        "model_gb": size / 1e9,
        "imports_gb": imports / 1e3,
        "with_model_gb": with_model / 1e3,
        "quantize_gb": after_quantize / 1e3,
        "peak_gb": peak / 1e3,
        "file_gb": sum(file.stat().st_size for file in Path(output).parent.iterdir()) / 1e9,
        "quantize_s": quantized - start,
        "export_s": exported - quantized,
        "parsed": parses(Path(output)),
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:5])
