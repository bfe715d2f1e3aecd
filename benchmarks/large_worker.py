"""One large export in a process of its own, so that its peak memory is its own; large_model.py starts these.

A tiny model of the same kind goes first: its peak is what Python, the imports and the exporter take whatever the size.
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
from benchmarks.fast import of_max

_TOKENS = 32


def llama(*, tiny: bool = False) -> torch.nn.Module:
    """Llama-2-7B's blocks, five of them, and a smaller vocabulary: 1.2 G parameters, 1.0 G of them quantized."""
    config = transformers.LlamaConfig(
        num_hidden_layers=1 if tiny else 5,
        hidden_size=128 if tiny else 4096,
        num_attention_heads=1 if tiny else 32,
        num_key_value_heads=1 if tiny else 32,
        intermediate_size=256 if tiny else 11008,
        vocab_size=128 if tiny else 24000,
        use_cache=False,
        dtype=torch.get_default_dtype(),
    )
    model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    return model


class Embedding(torch.nn.Module):
    """A table of 2.46 GB, larger than a protobuf message may be, and one linear."""

    def __init__(self, *, tiny: bool = False) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(128 if tiny else 600_000, 2048)
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


def compile_to_onnx(model: torch.nn.Module, recipe: str, path: Path) -> dict[str, float]:
    """Quantize, export and verify; peak memory and seconds after each."""
    ids = torch.randint(0, 100, (1, _TOKENS))
    batch = {"input_ids": ids}
    start = time.perf_counter()
    program = qcompile.quantize(model, (), batch, recipe=of_max(recipe), calibration=[batch], progress=False)
    quantized, after_quantize = time.perf_counter(), peak_mb()
    report = qcompile.export_onnx(program, path)
    exported = time.perf_counter()
    assert report.checks and all(check.passed for check in report.checks)
    return {
        "quantize_gb": after_quantize / 1e3,
        "peak_gb": peak_mb() / 1e3,
        "quantize_s": quantized - start,
        "export_s": exported - quantized,
    }


def main(name: str, recipe: str, dtype: str, output: str) -> None:
    wanted, build = getattr(torch, dtype), {"llama": llama, "embedding": Embedding}[name]
    path = Path(output)
    imports = peak_mb()
    baseline = compile_to_onnx(make(lambda: build(tiny=True), wanted), recipe, path)["peak_gb"]
    model = make(lambda: build(), wanted)
    size = sum(parameter.nbytes for parameter in model.parameters())
    measured = {
        "model_gb": size / 1e9,
        "imports_gb": imports / 1e3,
        "tiny_gb": baseline,
        "with_model_gb": peak_mb() / 1e3,
        **compile_to_onnx(model, recipe, path),
        "file_gb": sum(file.stat().st_size for file in path.parent.iterdir()) / 1e9,
    }
    print(json.dumps({**measured, "parsed": parses(path)}))


if __name__ == "__main__":
    main(*sys.argv[1:5])
