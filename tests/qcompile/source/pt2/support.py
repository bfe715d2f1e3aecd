"""Saved programs, and copies of them with a part changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

GRAPH, INPUTS, WEIGHTS = "models/model.json", "data/sample_inputs/model.pt", "data/weights/model_weights_config.json"
_OF_THE_WRITER = (".data/version", ".data/serialization_id", "byteorder")


class Net(torch.nn.Module):
    """A bit of all: parameters, buffers, constants, nested inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({"a-b": torch.nn.Linear(8, 4)})
        self.register_buffer("kept", torch.rand(4))
        self.register_buffer("left", torch.rand(4), persistent=False)
        self.constant = torch.arange(4.0)

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor], *, scale: float = 2.0) -> dict[Any, Any]:
        y = self.layers["a-b"](x) * self.kept + self.left + self.constant
        return {"y": y * scale, 1: (more["the mask"] + 1, [y.reshape(-1), torch.arange(x.shape[0] * 2 + 1)])}


def save_net(path: Path) -> Net:
    """Save `Net` with a dynamic batch."""
    net, x = Net().eval(), torch.rand(4, 8)
    sizes = {
        "x": {0: torch.export.Dim("batch", max=64)},
        "more": {"the mask": {0: torch.export.Dim.AUTO}},
        "scale": None,
    }
    program = torch.export.export(net, (x, {"the mask": x}), {"scale": 3.0}, dynamic_shapes=sizes)
    torch.export.save(program, path)
    return net


def records(path: Path) -> dict[str, bytes]:
    reader = torch._C.PyTorchFileReader(str(path))
    return {name: reader.get_record(name) for name in reader.get_all_records() if name not in _OF_THE_WRITER}


def write(path: Path, parts: Mapping[str, bytes]) -> None:
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in parts.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()


def changed(path: Path, name: str, change: Callable[[Any], None]) -> dict[str, bytes]:
    """The parts of `path` after `change` was at the JSON called `name`."""
    parts = records(path)
    tree = json.loads(parts[name])
    change(tree)
    return {**parts, name: json.dumps(tree).encode()}
