"""Take a model that NVIDIA Model Optimizer quantized, with its scales as they are, to an ONNX file that TensorRT fuses.

Wants nvidia-modelopt.
"""

import modelopt.torch.quantization as mtq
import torch

import qcompile

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).eval()
samples = [torch.randn(32, 64) for _ in range(4)]

mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda quantized: [quantized(x) for x in samples])

program = qcompile.import_quantized(model, (samples[0],))
report = qcompile.export_onnx(program, "model.onnx", target="tensorrt", compare=samples[0])
print("quantized:", report.quantized)
print("checks passed:", all(check.passed for check in report.checks))
