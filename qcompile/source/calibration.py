"""Calibration data from a file, a folder or a function, or made up, as batches for `qcompile.quantize`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import CalibrationError, SourceError
from qcompile.source import tensor_files, texts
from qcompile.source.data import Data, ListedBatches, batch_size, tensor_inputs
from qcompile.source.images import ImageFolder
from qcompile.source.load import FUNCTION, call_function, import_function
from qcompile.source.model import Source
from qcompile.source.preparation import AS_THE_MODEL_SAYS, IMAGE_FOLDERS, OTHERS, TEXT_FILES, Preparation
from qcompile.source.state_files import StateFile, is_state_file
from qcompile.source.tensor_files import TensorFile, first_samples
from qcompile.source.texts import TextFile

RANDOM = "random"
MADE_UP = "calibrated with random data: the ranges mean nothing, and neither does this file's accuracy"
_RANDOM_BATCHES = 4


def open_calibration(
    text: str, model: str = "", samples: int | None = None, how: Preparation = AS_THE_MODEL_SAYS
) -> Data:
    """The calibration data that `text` names.

    Args:
        text: a `.safetensors`, `.npz` or `.pt` file with a tensor for each input, by name, whose first axis is the
            samples; a `.npy` or `.pt` file with the one tensor of a model with one input; a `.pt` file with a list of
            batches; a state that `qcompile calibrate` wrote; a folder of images; a `.txt` file, or a `.jsonl` file with
            a "text" or the "messages" of a chat on each line; `package.module:function`, which returns an iterable of
            batches; or `random`, made-up data that is good for nothing but trying out.
        model: the source of the model as `load_source` takes it: a directory has the processor of images and the
            tokenizer of texts.
        samples: how many to take. None: all that tensors and functions have, 128 of images and texts.
        how: how texts and images are prepared.

    Raises:
        CalibrationError: there is no such file, or it cannot be read.
        SourceError: the function cannot be found.
    """
    path = Path(text)
    is_text = path.suffix in texts.SUFFIXES
    how.check(text, IMAGE_FOLDERS if path.is_dir() else TEXT_FILES if is_text else OTHERS)
    if text == RANDOM:
        return _MadeUp(samples)
    if path.is_dir():
        return ImageFolder(path, model, samples, how)
    if is_state_file(path):
        return StateFile(path, samples)
    if path.suffix in tensor_files.SUFFIXES:
        return TensorFile(path, samples)
    if is_text:
        return TextFile(path, model, samples, how)
    if FUNCTION.fullmatch(text) and not path.exists():
        return _Function(text, samples)
    problem = "is nothing that can be read" if path.exists() else "is not there"
    raise CalibrationError(
        f"calibration data {text!r} {problem}: give a folder of images,"
        f" {', '.join((*texts.SUFFIXES, *tensor_files.SUFFIXES))}, package.module:function, or {RANDOM!r} to try out"
        " without data"
    )


class _Function(Data):
    """What a function returns: an iterable of batches."""

    def __init__(self, name: str, samples: int | None) -> None:
        super().__init__(name)
        self.samples = samples
        import_function(name)

    def batches(self, source: Source) -> Iterable[Any]:
        result = call_function(self.name)
        if isinstance(result, Mapping | torch.Tensor) or not isinstance(result, Iterable):
            raise SourceError(
                f"{self.name} returned a {type(result).__name__}; it has to return an iterable of batches"
            )
        return result if self.samples is None else first_samples(result, self.samples)


class _MadeUp(Data):
    """Normal floats with mean and deviation of the example, integers in its range; the seed is fixed."""

    def __init__(self, samples: int | None) -> None:
        super().__init__(RANDOM)
        self.samples = samples
        self.notices = [MADE_UP]

    def batches(self, source: Source) -> Iterable[Any]:
        random = torch.Generator().manual_seed(0)
        made = (source.batch([_like(value, random) for value in source.inputs.values()]) for _ in iter(int, 1))
        size = batch_size(tensor_inputs(source))
        listed = list(first_samples(made, self.samples or _RANDOM_BATCHES * size))
        return ListedBatches(listed, "made up", self.notices)


def _like(value: Any, random: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor) or not value.numel() or value.dtype == torch.bool or value.is_complex():
        return value
    if not value.is_floating_point():
        low, high = int(value.min()), int(value.max())
        return torch.randint(low, high + 1, value.shape, generator=random).to(value.dtype)
    data = value.double()
    if not bool(torch.isfinite(data).all()):
        return value  # a mask to be added, whose pattern is all that it says
    deviation = float(data.std(correction=0)) or 1.0
    return (torch.randn(value.shape, generator=random) * deviation + float(data.mean())).to(value.dtype)
