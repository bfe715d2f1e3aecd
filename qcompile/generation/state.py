"""What a decoder keeps between two steps: the outputs of the one, bound as inputs of the next without a copy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import GenerationError
from qcompile.generation.decoder_file import CACHE_POSITION, CacheTensor, DecoderFile
from qcompile.onnx.session import import_onnxruntime

__all__ = ["Appended", "State", "empty", "state_of"]

Integers = npt.NDArray[np.int64]


class State(ABC):
    """The caches of one run.

    Attributes:
        file: whose caches. rows: of the batch. length: tokens that were given so far, padding included.
    """

    def __init__(self, file: DecoderFile, rows: int) -> None:
        self.file, self.rows, self.length = file, rows, 0

    @abstractmethod
    def tensors(self) -> Mapping[str, Any]:
        """Input -> OrtValue, of the next step."""

    @abstractmethod
    def mask(self, given: Integers) -> Integers:
        """The attention mask `[rows, ?]` of the next step for `given`, one of all tokens so far and the new ones."""

    @abstractmethod
    def accept(self, outputs: Mapping[str, Any], new: int) -> None:
        """Keep what a step of `new` tokens gave back."""

    def inputs(self, new: int) -> dict[str, Integers]:
        """Inputs that tell where `new` tokens go, where the file has such."""
        return {}


class Appended(State):
    """Caches that each step makes longer: what it gives back is the next one's past."""

    def __init__(self, file: DecoderFile, rows: int) -> None:
        super().__init__(file, rows)
        self._kept = {tensor.past: empty(tensor, rows, 0) for tensor in file.caches}

    def tensors(self) -> Mapping[str, Any]:
        return self._kept

    def mask(self, given: Integers) -> Integers:
        return given

    def accept(self, outputs: Mapping[str, Any], new: int) -> None:
        self._kept = {tensor.past: outputs[tensor.present] for tensor in self.file.caches}
        self.length += new


def empty(tensor: CacheTensor, rows: int, tokens: int) -> Any:
    """An OrtValue of zeros."""
    ort = import_onnxruntime()
    size = (rows, tensor.heads, tokens, tensor.width)
    carrier = np.zeros(size, {1: np.uint8, 2: np.uint16, 4: np.float32}[tensor.element_bytes])
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(carrier, tensor.elem_type)


def state_of(file: DecoderFile, rows: int) -> State:
    """An empty state. Raises GenerationError for a kind of cache that is not known."""
    if file.length is not None or CACHE_POSITION in file.inputs:
        raise GenerationError(
            f"{file.path} has a cache of {file.length or 'fixed'} tokens that is written in place: only caches that are"
            " appended to (--cache dynamic) are run here"
        )
    return Appended(file, rows)
