"""A ViT that nvidia-modelopt quantized to FP8, as its two ONNX exporters write it."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def quantized_vit(
    *, layers: int = 2, hidden: int = 64, heads: int = 2, image: int = 96
) -> tuple[nn.Module, torch.Tensor]:
    """The model, with q, k and v of its attention quantized as modelopt's onnx_ptq example does; and an input."""
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="pip install nvidia-modelopt")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        image_size=image,
        num_labels=10,
    )
    model = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(1, 3, image, image)
    recipe = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    recipe["quant_cfg"].append({"quantizer_name": "*[qkv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}})
    with torch.no_grad():
        mtq.quantize(model, recipe, lambda m: m(torch.randn_like(x)))
    return model, x


def export_plainly(model: nn.Module, x: torch.Tensor, path: Path, opset: int) -> None:
    """torch.onnx.export: float weights behind `trt::TRT_FP8QuantizeLinear` and `TRT_FP8DequantizeLinear`."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x,), str(path), dynamo=False, opset_version=opset, input_names=["x"], output_names=["logits"]
        )


def export_for_tensorrt(
    model: nn.Module, x: torch.Tensor, path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str = "fp16"
) -> None:
    """modelopt's own exporter: FP8 weights, and `QuantizeLinear`, `DequantizeLinear` in the domain `trt`."""
    for name in ("onnx_graphsurgeon", "onnxconverter_common", "onnxslim", "lief"):
        pytest.importorskip(name, reason="modelopt's exporter needs onnx-graphsurgeon, onnxconverter-common, ...")
    # Its half-precision route imports tensorrt without saying so; the RTX edition has all that it uses.
    monkeypatch.setitem(sys.modules, "tensorrt", pytest.importorskip("tensorrt_rtx"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch._deploy.utils import OnnxBytes, get_onnx_bytes_and_metadata

        data, _ = get_onnx_bytes_and_metadata(model=model, dummy_input=(x,), weights_dtype=dtype, model_name="vit")
    files: dict[str, Any] = OnnxBytes.from_bytes(data).onnx_model
    (content,) = files.values()
    path.write_bytes(content)
