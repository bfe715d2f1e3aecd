"""Calibrate with data of your own, given by name and read batch by batch, for a program with a dynamic batch size."""

from collections.abc import Iterator

import torch

import qcompile


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(100, 64)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
        self.head = torch.nn.Linear(64, 8)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.mlp(self.embed(ids)) * mask[..., None]
        return self.head(hidden.sum(1))


def batches() -> Iterator[dict[str, torch.Tensor]]:
    """Keyword arguments of the model, read when they are needed; a DataLoader of such dictionaries does as well."""
    for length in (12, 16, 16, 9):
        yield {"ids": torch.randint(100, (4, 16)), "mask": (torch.arange(16) < length).float().expand(4, 16)}


torch.manual_seed(0)
model, example = Classifier().eval(), next(batches())
shapes = {name: {0: torch.export.Dim("batch", min=1, max=64)} for name in example}  # files for any batch from 1 to 64
program = qcompile.quantize(
    model, kwargs=example, recipe="fp8", calibration=batches(), dynamic_shapes=shapes, progress=False
)
report = qcompile.export_onnx(program, "model.onnx", target="portable", compare=next(batches()))
print("quantized:", report.coverage, "least headroom:", report.headroom[0])

one = {name: value[:1].numpy() for name, value in next(batches()).items()}
print("logits of a batch of one:", qcompile.onnx_session("model.onnx").run(None, one)[0].shape)
