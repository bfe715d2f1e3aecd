"""A recipe of your own: start from a shipped part, and keep the last block in half precision."""

from pathlib import Path

import torch

import qcompile

RECIPE = """
metadata: {name: mine, description: FP8 linear layers but in the last block}
calibration: {algorithm: max}
rules:
  - import: fp8_linears
  - {quantizer: "*layers.-1.*", enable: false}
"""
Path("mine.yaml").write_text(RECIPE)

torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=256, batch_first=True, norm_first=True)
model = torch.nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False).eval()
samples = [torch.randn(1, 48, 64) for _ in range(4)]

program = qcompile.quantize(model, (samples[0],), recipe="mine.yaml", calibration=samples, progress=False)
report = qcompile.export_onnx(program, "model.onnx", target="portable")
print("quantized:", *report.quantized)
print("not:", *report.unquantized)
assert not any(module.startswith("layers.2") for module in report.quantized)
