"""What `qcompile calibrate` wrote, in the place of data to calibrate with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from qcompile.errors import CalibrationError
from qcompile.files import replaced
from qcompile.messages import first_line
from qcompile.quantization.state import is_state
from qcompile.source.data import Data
from qcompile.source.model import Source
from qcompile.source.tensor_reading import check_tensors, read_tensors

SUFFIX = ".safetensors"


class StateFile(Data):
    """Ranges by the names of quantizers, which need no batch."""

    def __init__(self, path: Path, samples: int | None) -> None:
        super().__init__(str(path))
        if samples is not None:
            raise CalibrationError(f"{path} is a calibrated state and no data: a number of samples says nothing of it")
        self.state = read_state(path)

    def batches(self, source: Source) -> Mapping[str, torch.Tensor]:
        return self.state


def is_state_file(path: Path) -> bool:
    """Whether a file that can be read holds a state, by the names in it."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != SUFFIX or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError):  # who reads it says so
        return False
    return bool(names) and is_state(dict.fromkeys(names))


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Raises CalibrationError for a file that is not there, or holds something else."""
    if not path.is_file():
        raise CalibrationError(f"there is no state {path}")
    found = read_tensors(path)
    if not is_state(found):
        raise CalibrationError(f"{path} is no state that `qcompile calibrate` wrote")
    check_tensors(found, path)
    return dict(found)


def write_state(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write it whole or not at all. Raises CalibrationError where that is not possible."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replaced(path, CalibrationError) as new:
        try:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, new, {"format": "pt"})
        except SafetensorError as error:
            raise CalibrationError(f"cannot write {path}: {first_line(error)}") from error
