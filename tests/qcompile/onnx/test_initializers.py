"""Constants of a file: those that a rewrite of onnxscript left out of the graph."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import qcompile


class Clamps(nn.Module):
    """Several clamps of one tensor by stored bounds, as the clipped linear layers of Gemma's audio tower have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        for i in range(3):
            self.register_buffer(f"low{i}", torch.tensor(-0.1 - 0.2 * i))
            self.register_buffer(f"high{i}", torch.tensor(0.1 + 0.2 * i))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        bounds = [(getattr(self, f"low{i}"), getattr(self, f"high{i}")) for i in range(3)]
        return self.out(torch.stack([torch.clamp(y, low, high) for low, high in bounds]))


def test_several_clamps_of_one_tensor(tmp_path: Path) -> None:
    x = torch.randn(5, 16)
    program = qcompile.quantize(Clamps().eval(), (x,), calibration=[x], dtype=torch.float32, progress=False)
    for target in ("tensorrt", "portable"):
        qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)
        session = qcompile.onnx_session(tmp_path / "m.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), program.module()(x), rtol=1e-3, atol=1e-3)
