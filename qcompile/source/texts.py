"""Calibration data in a file of text, which the tokenizer of the model's directory turns into tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import CalibrationError
from qcompile.messages import first_line, some
from qcompile.source.data import DEFAULT_SAMPLES, Data, LazyBatches, as_batch, batch_size, tensor_inputs
from qcompile.source.model import Source
from qcompile.source.preprocessing import TEXT, load_preprocessor

SUFFIXES = (".txt", ".jsonl")


class TextFile(Data):
    """The lines of a `.txt` file, or the `text` of each line of a `.jsonl` file; empty ones are left out.

    Samples have the length of the example inputs. A model that takes an attention mask has a line in each, cut off or
    filled up; others, decoders, have the tokens of all lines one after another, with the end-of-sequence token between.
    """

    def __init__(self, path: Path, model: str, samples: int | None) -> None:
        super().__init__(str(path))
        if not path.is_file():
            raise CalibrationError(f"there is no calibration file {path}")
        self.path, self.samples = path, DEFAULT_SAMPLES if samples is None else samples
        if next(_texts(path), None) is None:
            raise CalibrationError(f"{path} has no line of text")
        self.tokenizer = load_preprocessor(TEXT, model, path)

    def __str__(self) -> str:
        return f"at most {self.samples} samples of {self.name}"

    def batches(self, source: Source) -> Iterable[Any]:
        wanted = tensor_inputs(source)
        if "input_ids" not in wanted:
            raise CalibrationError(f"{self.name} is text, and {source.name} takes {', '.join(wanted)} and no input_ids")
        padded = "attention_mask" in wanted
        given = self.tokenizer.model_input_names if padded else ["input_ids"]
        if missing := [name for name in wanted if name not in given]:
            raise CalibrationError(
                f"{source.name} takes {some(missing)}, too, which a text does not give: give tensors of all inputs"
                " (.safetensors, .npz), or take a part of the model with --submodule"
            )
        length = wanted["input_ids"].shape[-1]
        encoded = self._lines(length) if padded else self._packed(length)
        total, size = len(encoded["input_ids"]), batch_size(wanted)
        if total < size:
            raise CalibrationError(f"{self.name} makes {total} samples, fewer than one batch of {size}")
        return LazyBatches(
            lambda start, stop: as_batch(source, {n: v[start:stop] for n, v in encoded.items()}, self.name), total, size
        )

    def _lines(self, length: int) -> Mapping[str, torch.Tensor]:
        lines = list(islice(_texts(self.path), self.samples))
        encoded = self._encoded(lines, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        full = [line for line, mask in zip(lines, encoded["attention_mask"], strict=True) if mask.all()]
        if cut := sum(len(ids) > length for ids in (self._encoded(full)["input_ids"] if full else ())):
            self.notices.append(f"{self.name}: {cut} of {len(lines)} lines are cut off after {length} tokens")
        return dict(encoded)

    def _encoded(self, texts: str | list[str], **options: Any) -> Any:
        try:
            return self.tokenizer(texts, **options)
        except Exception as error:  # no token to fill up with; text that is no Unicode
            raise CalibrationError(f"{self.name}: the tokenizer fails: {first_line(error)}") from error

    def _packed(self, length: int) -> Mapping[str, torch.Tensor]:
        end = self.tokenizer.eos_token_id
        ids: list[int] = []
        for text in _texts(self.path):
            ids += self._encoded(text)["input_ids"]
            if end is not None and ids[-1:] != [end]:
                ids.append(end)
            if len(ids) >= self.samples * length:
                break
        count = min(self.samples, len(ids) // length)
        if not count:
            raise CalibrationError(
                f"{self.name} has {len(ids)} tokens, fewer than one sample of {length}: give more text, or --sequence"
                f" {len(ids)}"
            )
        return {"input_ids": torch.tensor(ids[: count * length]).reshape(count, length)}


def _texts(path: Path) -> Iterator[str]:
    """What stands in the file, stripped, without what is empty."""
    number = 1
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                text = _of_json(line, path, number) if path.suffix == ".jsonl" else line
                if "\0" in text:
                    raise CalibrationError(f"{path}:{number} holds a zero byte: it is no text")
                if text := text.strip():
                    yield text
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is no UTF-8 text, from line {number} or soon after: {error.reason}") from error


def _of_json(line: str, path: Path, number: int) -> str:
    if not line.strip():
        return ""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}:{number} is not JSON: {first_line(error)}") from error
    text = content.get("text") if isinstance(content, dict) else None
    if not isinstance(text, str):
        keys = f"has the keys {some(list(content))}" if isinstance(content, dict) else f"is a {type(content).__name__}"
        raise CalibrationError(f'{path}:{number} {keys}; an object with a string "text" is wanted on each line')
    return text
