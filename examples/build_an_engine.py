"""Build a TensorRT engine ahead of time, on a machine without a GPU, and have it prove that everything was fused.

Wants the extra `tensorrt-rtx`.
"""

import torch

import qcompile

torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=256, batch_first=True, norm_first=True)
model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
samples = [torch.randn(1, 48, 64) for _ in range(4)]

program = qcompile.quantize(model, (samples[0],), recipe="fp8", calibration=samples, progress=False)
qcompile.export_onnx(program, "model.onnx", target="tensorrt")

# Four GEMMs a layer: q, k and v together, the output projection, and two of the MLP. Fewer in FP8 are an error.
engine = qcompile.build_engine("model.onnx", "model.engine", target="sm89", expect={"attention_fp8": 2, "gemm_fp8": 8})
print(f"{engine.kernels} kernels; FP8 attentions: {engine.attention.fp8} of {engine.attention.total}; {engine.gemms}")
for module, precision in engine.precisions.items():
    print(f"  {module}: {precision}")
