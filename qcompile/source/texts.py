"""Calibration data in a file of text, which a directory's tokenizer turns into tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qcompile.checkpoint.files.json_files import CONFIG
from qcompile.checkpoint.hub.config import auto_config, import_transformers
from qcompile.errors import CalibrationError
from qcompile.messages import some
from qcompile.remedy import Remedy, with_remedy
from qcompile.source.data import DEFAULT_SAMPLES, Data, LazyBatches, as_batch, batch_size, tensor_inputs
from qcompile.source.examples import is_causal, token_limit
from qcompile.source.lines import SUFFIXES, read_lines
from qcompile.source.model import Source
from qcompile.source.preparation import Preparation
from qcompile.source.preprocessing import TEXT, load_preprocessor
from qcompile.source.tokens import TOKEN_INPUTS, Samples, Tokens

__all__ = ["SUFFIXES", "TextFile"]

_DECODER_TOKENS, _FEWEST_TOKENS = 512, 128


class TextFile(Data):
    """The lines of a `.txt` file, or the "text" or "messages" of each line of a `.jsonl` file.

    Samples have the length of the example inputs. A model that takes an attention mask has a line in each, cut off or
    filled up; others, decoders, have the tokens of all lines one after another, with the end-of-sequence token between.
    """

    def __init__(self, path: Path, model: str, samples: int | None, how: Preparation) -> None:
        super().__init__(str(path))
        if not path.is_file():
            raise CalibrationError(f"there is no calibration file {path}")
        self.path, self.model, self.how = path, model, how
        self.samples = DEFAULT_SAMPLES if samples is None else samples
        if next(read_lines(path, how.text_column), None) is None:
            raise CalibrationError(f"{path} has no line of text")
        self.tokens = Tokens(path, load_preprocessor(TEXT, how.processor or model, path), how.text_column)
        self._made = f"at most {self.samples} samples"

    def __str__(self) -> str:
        return f"{self._made} of {self.name}"

    def shapes(self) -> dict[str, Sequence[int]]:
        """Of a directory's decoder: longer samples than other models get, and the mask that filling up needs."""
        if not (Path(self.model) / CONFIG).is_file():
            return {}
        config = auto_config(import_transformers(CalibrationError, silent=True), Path(self.model), CalibrationError)
        if not is_causal(config):
            return {}
        length = self.how.sequence_length or self._decoder_length(token_limit(config))
        names = TOKEN_INPUTS[:1] if self.how.pack is not False else TOKEN_INPUTS[:2]
        if len(names) > 1:
            self.notices.append(
                f"{self.name} is not packed: what fills samples up is hidden by an input attention_mask"
            )
        return {name: (1, length) for name in names}

    def _decoder_length(self, limit: int) -> int:
        """As others calibrate; less for a model with fewer positions, or a text with fewer tokens."""
        length = min(_DECODER_TOKENS, limit, self.tokens.tokenizer.model_max_length)
        there = length if self.how.pack is False else self.tokens.count(length)
        while there < length and length >= 2 * _FEWEST_TOKENS:
            length //= 2
        return int(length)

    def batches(self, source: Source) -> Iterable[Any]:
        wanted = tensor_inputs(source)
        if "input_ids" not in wanted:
            raise CalibrationError(f"{self.name} is text, and {source.name} takes {', '.join(wanted)} and no input_ids")
        if missing := [name for name in wanted if name not in TOKEN_INPUTS]:
            raise CalibrationError(
                f"{source.name} takes {some(missing)}, too, which a text does not give: give tensors of all inputs"
                " (.safetensors, .npz), or take a part of the model with --submodule"
            )
        made = self._sampled(source, wanted["input_ids"].shape[-1], "attention_mask" in wanted)
        total, size = len(made), batch_size(wanted)
        if total < size:
            raise CalibrationError(f"{self.name} makes {total} samples, fewer than one batch of {size}")
        self._made = f"{total} samples of {wanted['input_ids'].shape[-1]} tokens"

        def batch(start: int, stop: int) -> Any:
            tensors = {name: made.tensors[name][start:stop] for name in wanted}
            return as_batch(source, tensors, self._place(made, start, stop))

        return LazyBatches(batch, total, size, lambda start, stop: self._place(made, start, stop), self.notices)

    def _place(self, made: Samples, start: int, stop: int) -> str:
        first, last = made.lines[start][0], made.lines[stop - 1][1]
        return f"{self.name}, line{f' {first}' if first == last else f's {first} to {last}'}"

    def _sampled(self, source: Source, length: int, masked: bool) -> Samples:
        if self.how.pack or (self.how.pack is None and not masked):
            made = self.tokens.packed(length, self.samples)
            if not made.lines:
                count = self.tokens.count(length)
                problem = CalibrationError(
                    f"{self.name} has {count} tokens, fewer than one sample of {length}: give more text, or --sequence"
                    f" {count}"
                )
                raise with_remedy(problem, Remedy(options={"--sequence": (str(count),)}))
            return made
        if not masked:
            raise CalibrationError(
                f"{source.name} takes no attention_mask, so it would read what samples that are not packed are filled"
                " up with: pack them"
            )
        made = self.tokens.separate(length, self.samples)
        if made.cut:
            self.notices.append(f"{self.name}: {made.cut} of {len(made)} lines are cut off after {length} tokens")
        return made
