"""Texts as samples of tokens: packed one after another, or one each, cut off and filled up."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import CalibrationError
from qcompile.messages import first_line
from qcompile.source.lines import Line, read_lines

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Samples:
    """Inputs of all samples by name, `[samples, tokens]`, the lines that each is of, and how many were cut off."""

    tensors: Mapping[str, torch.Tensor]
    lines: Sequence[tuple[int, int]]
    cut: int = 0

    def __len__(self) -> int:
        return len(self.lines)


class Tokens:
    """The tokens of a file, by a tokenizer of transformers."""

    def __init__(self, path: Path, tokenizer: Any, column: str | None) -> None:
        self.path, self.tokenizer, self.column = path, tokenizer, column
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token  # the mask hides it: any does

    def count(self, most: int) -> int:
        """How many there are, up to `most`."""
        found = 0
        for _, ids in self._stream():
            found += len(ids)
            if found >= most:
                return most
        return found

    def separate(self, length: int, samples: int) -> Samples:
        """A line a sample, as the tokenizer cuts it off and fills it up."""
        rows: list[Any] = []
        lines, cut = [], 0
        for line in islice(read_lines(self.path, self.column), samples):
            cut += len(self._encoded(line)["input_ids"]) > length
            rows.append(self._encoded(line, padding="max_length", truncation=True, max_length=length))
            lines.append((line.number, line.number))
        found = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        return Samples(_completed(found, found["attention_mask"]), lines, cut)

    def packed(self, length: int, samples: int) -> Samples:
        """The tokens of all lines one after another, the end of sequence between them, cut into pieces."""
        ids: list[int] = []
        starts: list[int] = []
        numbers: list[int] = []
        for number, new in self._stream():
            starts.append(len(ids))
            numbers.append(number)
            ids += new
            if len(ids) >= samples * length:
                break
        count = min(samples, len(ids) // length)
        lines = [
            (numbers[bisect_right(starts, i * length) - 1], numbers[bisect_right(starts, (i + 1) * length - 1) - 1])
            for i in range(count)
        ]
        cut = torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)
        return Samples(_completed({"input_ids": cut}, torch.ones_like(cut)), lines)

    def _stream(self) -> Iterator[tuple[int, list[int]]]:
        end = self.tokenizer.eos_token_id
        for line in read_lines(self.path, self.column):
            ids = list(self._encoded(line)["input_ids"])
            if end is not None and ids[-1:] != [end]:
                ids.append(end)
            yield line.number, ids

    def _encoded(self, line: Line, **options: Any) -> Any:
        """The tokens of a line; a chat template writes the special ones itself."""
        try:
            if isinstance(line.content, str):
                return self.tokenizer(line.content, **options)
            if not self.tokenizer.chat_template:
                raise CalibrationError(
                    f"{self.path}:{line.number} is a chat, and the tokenizer has no chat template: give texts"
                )
            text = self.tokenizer.apply_chat_template(list(line.content), tokenize=False)
            return self.tokenizer(text, add_special_tokens=False, **options)
        except CalibrationError:
            raise
        except Exception as error:  # no token to fill up with; text that is no Unicode; a role that a template refuses
            raise CalibrationError(f"{self.path}:{line.number}: the tokenizer fails: {first_line(error)}") from error


def _completed(found: Mapping[str, torch.Tensor], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """With what models take beside the tokens, where the tokenizer does not make it."""
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(mask),
        "position_ids": position,
        **found,
    }
