"""Quantize a module to FP8 with a few samples, write an ONNX file, and compare what ONNX Runtime makes of it."""

import torch

import qcompile

torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=256, batch_first=True, norm_first=True)
model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).eval()
samples = [torch.randn(1, 48, 64) for _ in range(4)]  # yours: what the model will see in use

program = qcompile.quantize(model, (samples[0],), recipe="fp8", calibration=samples, progress=False)
report = qcompile.export_onnx(program, "model.onnx", target="portable", input_names=["x"], output_names=["y"])
print("quantized:", report.coverage)

session = qcompile.onnx_session("model.onnx")
(y,) = session.run(["y"], {"x": samples[0].numpy()})
with torch.no_grad():
    expected = model(samples[0])
error = (torch.from_numpy(y) - expected).norm() / expected.norm()
print(f"relative error of the file: {error:.3f}")
assert error < 0.1
