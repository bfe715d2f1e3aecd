"""Make of an ONNX file that another tool quantized what TensorRT takes: standard operators, codes for weights.

Wants the extra `onnxruntime`, whose own quantizer writes the file here.
"""

import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import qcompile


class Samples(CalibrationDataReader):
    def __init__(self, samples: list[torch.Tensor]) -> None:
        self.samples = iter(samples)

    def get_next(self) -> dict[str, object] | None:
        sample = next(self.samples, None)
        return None if sample is None else {"x": sample.numpy()}


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).eval()
samples = [torch.randn(8, 64) for _ in range(4)]
torch.onnx.export(model, (samples[0],), "float.onnx", input_names=["x"], dynamo=True, verbose=False)
form = {"quant_format": QuantFormat.QOperator, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
quantize_static("float.onnx", "old.onnx", Samples(samples), **form)

report = qcompile.repair_onnx("old.onnx", "new.onnx")
for name in ("old.onnx", "new.onnx"):
    print(f"{name}:", sorted({f"{node.domain or 'onnx'}::{node.op_type}" for node in onnx.load(name).graph.node}))
print("standardized:", report.standardized, "signed activations:", report.signed, "zero points moved:", report.offsets)
print("checks passed:", all(check.passed for check in report.checks))
