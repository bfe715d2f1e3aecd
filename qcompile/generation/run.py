"""A decoder step by step in ONNX Runtime: tokens in, logits out, the cache stays where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import GenerationError
from qcompile.generation.decoder_file import LOGITS, MASK, POSITIONS, TOKENS, DecoderFile
from qcompile.generation.state import Integers, State, state_of
from qcompile.messages import first_line
from qcompile.onnx.session import import_onnxruntime

__all__ = ["Run", "padded"]


class Run:
    """One batch of texts: a prefill, then as many steps as are wanted, each of one token or more.

    Attributes:
        state: the caches. mask: `[rows, tokens]` of all that was given, 0 where it is padding.
    """

    def __init__(self, session: Any, file: DecoderFile, rows: int, *, context: int | None = None) -> None:
        """`context`: positions of the model, if they are known."""
        self.session, self.file, self.context = session, file, context
        self.state: State = state_of(file, rows)
        self.mask: Integers = np.zeros((rows, 0), np.int64)
        self._bound = session.io_binding()
        self._outputs = [value.name for value in session.get_outputs()]
        self._device = "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"

    def step(self, tokens: Integers, mask: Integers | None = None) -> npt.NDArray[Any]:
        """Logits `[rows, new or 1, vocabulary]` of `tokens` `[rows, new]`.

        Args:
            mask: of these tokens or of all so far, 0 where one is padding; None where none of the new ones is.

        Raises:
            GenerationError: tokens that the vocabulary lacks, a mask of another size, more tokens than the model has
                positions for, or what ONNX Runtime says of the file.
        """
        whole = self._whole(tokens, mask)
        if self.context is not None and (longest := int(whole.sum(1).max())) > self.context:
            raise GenerationError(
                f"{self.state.length} tokens of past and {tokens.shape[1]} new ones are {longest}, and the model has"
                f" {self.context} positions"
            )
        feeds = {TOKENS: tokens, MASK: self.state.mask(whole), **self.state.inputs(tokens.shape[1])}
        feeds[POSITIONS] = np.maximum(whole.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
        outputs = self._run(feeds)
        self.mask = whole
        self.state.accept(outputs, tokens.shape[1])
        return np.asarray(outputs[LOGITS].numpy())

    def _whole(self, tokens: Integers, mask: Integers | None) -> Integers:
        """The mask of all tokens so far and the new ones."""
        rows, before = self.mask.shape
        if tokens.ndim != 2 or tokens.shape[0] != rows or not tokens.size:
            raise GenerationError(f"tokens are [{rows}, new], one or more, and these are {list(tokens.shape)}")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.file.vocabulary:
            raise GenerationError(
                f"a token is 0 to {self.file.vocabulary - 1}, and these are {tokens.min()} to {tokens.max()}"
            )
        new = np.ones(tokens.shape, np.int64) if mask is None else np.asarray(mask, np.int64)
        if new.shape == (rows, before + tokens.shape[1]):
            return new
        if new.shape != tokens.shape:
            raise GenerationError(
                f"the mask is {list(new.shape)}, and there are {before} tokens of past and {tokens.shape[1]} new ones:"
                f" it has to be [{rows}, {before + tokens.shape[1]}]"
            )
        return np.concatenate([self.mask, new], 1)

    def _run(self, feeds: Mapping[str, Integers]) -> dict[str, Any]:
        bound, value = self._bound, import_onnxruntime().OrtValue.ortvalue_from_numpy
        held = {  # which the binding does not keep alive
            name: value(np.ascontiguousarray(feeds[name], self.file.inputs[name])) for name in self.file.inputs
        }
        for name, tensor in (held | dict(self.state.tensors())).items():
            bound.bind_ortvalue_input(name, tensor)
        for name in self._outputs:
            bound.bind_output(name, self._device)
        try:
            self.session.run_with_iobinding(bound)
        except Exception as error:  # ONNX Runtime's have no common class
            raise GenerationError(f"ONNX Runtime fails on {self.file.path}: {first_line(error)}") from error
        outputs = dict(zip(self._outputs, bound.get_outputs(), strict=True))
        bound.clear_binding_outputs()
        return outputs


def padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Integers, Integers]:
    """Tokens `[rows, longest]` with padding on the left, and their mask."""
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), pad, np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask
