"""Read what an export says of itself: what is quantized, what is not and why, and how near the numbers are."""

import json
from pathlib import Path

import torch

import qcompile


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
        self.memory = torch.nn.GRU(64, 64, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.memory(self.mlp(x))[0]


torch.manual_seed(0)
samples = [torch.randn(1, 6, 64) for _ in range(4)]
program = qcompile.quantize(Net().eval(), (samples[0],), recipe="fp8", calibration=samples, progress=False)
report = qcompile.export_onnx(program, "model.onnx", target="portable", compare=samples[0])

print("coverage:", report.coverage)  # kind -> (how many are quantized, how many there are)
print("quantized:", report.quantized)
print("unquantized:", report.unquantized)
for decline in report.declined:
    print(f"declined by {decline.pass_name}: {decline.reason}")
print("operators:", report.ops)
print("checks that failed:", [check.name for check in report.checks if not check.passed])
print("least headroom:", report.headroom[0])  # float16 ends at 65504
for layer in report.comparison.worst(2):
    print("differs most:", layer)

Path("report.json").write_text(report.to_json())  # `qcompile inspect report.json` shows it as tables
print(sorted(json.loads(report.to_json())))
