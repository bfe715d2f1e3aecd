"""`qcompile.Generator`: text from an ONNX file with a key/value cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.errors import GenerationError
from qcompile.generation.decoder_file import MASK, DecoderFile
from qcompile.generation.run import Run, padded
from qcompile.generation.sampling import Sampling
from qcompile.generation.session import decoder_session
from qcompile.generation.settings import Settings, model_file
from qcompile.generation.state import Integers
from qcompile.generation.text import Streamer, encode, load_tokenizer

__all__ = ["Generation", "Generator"]

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        tokens: new ones of each prompt, the one that ended it included. texts: of these; empty without a tokenizer.
        prompt_tokens: of all prompts together. prompt_seconds: until the first new token. seconds: of the others.
    """

    tokens: list[list[int]]
    texts: list[str]
    prompt_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        """Of all prompts together."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all prompts together, without the first of each."""
        later = sum(len(row) - 1 for row in self.tokens if row)
        return later / self.seconds if self.seconds else 0.0


@dataclass
class _Progress:
    """What has happened so far. finished: rows that have ended."""

    prompt_tokens: int
    rows: list[list[int]]
    finished: npt.NDArray[np.bool_]
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    tokens: Integers = field(default_factory=lambda: np.zeros(0, np.int64))


class Generator:
    """A decoder in ONNX Runtime.

    >>> generator = qcompile.Generator("out/")
    >>> generator.generate("The capital of France is", max_new_tokens=32).texts

    Attributes:
        file: what the ONNX file takes and gives. settings: what the files beside it say. session: of ONNX Runtime.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        sess_options: Any = None,
    ) -> None:
        """Open `path`, a directory that `qcompile export --cache` wrote, or an ONNX file with the same names.

        Args:
            tokenizer: of transformers, or a directory that has one; None for that of the directory.
            providers: as of `qcompile.onnx_session`.
            sess_options: of ONNX Runtime; None for those that run the file fast and right.

        Raises:
            GenerationError: the file is no decoder with a cache. QCompileError: it cannot be opened.
        """
        found = model_file(Path(path))
        self.file = DecoderFile.read(found)
        self.settings = Settings.read(found.parent)
        self.session = decoder_session(self.file, providers, sess_options)
        self._given = tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        """Raises GenerationError where there is none."""
        if self._given is not None and not isinstance(self._given, str | os.PathLike):
            return self._given
        return load_tokenizer(Path(self._given) if self._given is not None else self.file.path.parent)

    def run(self, rows: int = 1) -> Run:
        """Steps of your own: an empty cache, and a method that takes tokens and gives logits."""
        return Run(self.session, self.file, rows, context=self.settings.context)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_at_end: bool = True,
        chat: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Go on from `prompts`, until each has ended or has `max_new_tokens` more.

        Args:
            prompts: a text or its tokens, or several; shorter ones are filled up on the left.
            temperature: 0 takes the likeliest token each time; above it one is drawn, of the `top_k` likeliest (0: all)
                and of these the likeliest that have `top_p` of the probability. The same `seed` draws the same.
            stop_at_end: stop a text at a token that ends it, as generation_config.json has them.
            chat: a prompt is what a user says, in the chat template of the tokenizer.
            on_text: is called with each new piece of text. For a single prompt.

        Raises:
            GenerationError: a prompt that is empty, does not fit the vocabulary, or is longer with what is wanted than
                the model has positions; text without a tokenizer.
        """
        ids = self._tokens(prompts, chat)
        if on_text is not None and len(ids) > 1:
            raise GenerationError(f"on_text is for a single prompt, and there are {len(ids)}")
        streamer = Streamer(self.tokenizer) if on_text is not None else None
        sampling = Sampling(temperature, top_k, top_p)
        progress = _Progress(0, [], np.zeros(0, bool))
        for progress in self._steps(ids, max_new_tokens, sampling, np.random.default_rng(seed), stop_at_end):
            if streamer is not None and on_text is not None and (new := streamer.add([int(progress.tokens[0])])):
                on_text(new)
        if streamer is not None and on_text is not None and (rest := streamer.end()):
            on_text(rest)
        texts = self._texts(progress.rows) if self._has_text(prompts) else []
        return Generation(progress.rows, texts, progress.prompt_tokens, progress.prompt_seconds, progress.seconds)

    def _steps(
        self, ids: list[list[int]], most: int, sampling: Sampling, random: np.random.Generator, stops: bool
    ) -> Iterator[_Progress]:
        """One after another, with the tokens that are new."""
        ends = self.settings.ends if stops else frozenset()
        pad = next(iter(sorted(self.settings.ends)), 0) if self.settings.pad is None else self.settings.pad
        self._check(ids, most)
        tokens, mask = padded(ids, min(pad, self.file.vocabulary - 1))
        run = self.run(len(ids))
        progress = _Progress(int(mask.sum()), [[] for _ in ids], np.zeros(len(ids), bool))
        for number in range(most):
            start = time.perf_counter()
            logits = run.step(tokens, mask)[:, -1]
            chosen = np.where(progress.finished, pad, sampling.choose(logits, random))
            spent = time.perf_counter() - start
            progress.prompt_seconds += 0 if number else spent
            progress.seconds += spent if number else 0
            for index in np.flatnonzero(~progress.finished):
                progress.rows[index].append(int(chosen[index]))
            progress.finished = progress.finished | np.isin(chosen, list(ends))
            progress.tokens = chosen
            yield progress
            if progress.finished.all():
                return
            tokens, mask = chosen[:, None], np.ones((len(ids), 1), np.int64)

    def _check(self, ids: list[list[int]], most: int) -> None:
        """Raise GenerationError for what would fail, or be wrong, after minutes."""
        if most < 1:
            raise GenerationError(f"max_new_tokens of {most}: it is 1 or more")
        for number, row in enumerate(ids):
            if not row:
                raise GenerationError(f"prompt {number} has no tokens: a text begins with one at least")
        longest, limit = max(map(len, ids)), self.settings.context
        if self.file.length is not None:
            limit = min(self.file.length, limit or self.file.length)
        if limit is not None and longest + most - 1 > limit:  # the last token is not given to the model
            room = limit - longest + 1
            instead = f"ask for {room} new ones at most" if room > 0 else "give a shorter prompt"
            raise GenerationError(
                f"a prompt of {longest} tokens and {most} new ones are more than the {limit} positions that there are:"
                f" {instead}"
            )
        if len({len(row) for row in ids}) > 1 and MASK not in self.file.inputs:
            raise GenerationError(
                f"{self.file.path} takes no {MASK}, so that prompts of several lengths cannot be filled up: give them"
                " one at a time"
            )

    def _tokens(self, prompts: Prompt | Sequence[Prompt], chat: bool) -> list[list[int]]:
        single = isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], str | Sequence))
        listed: Sequence[Any] = [prompts] if single else prompts
        if not len(listed):
            raise GenerationError("there is no prompt")
        return [encode(self.tokenizer, p, chat=chat) if isinstance(p, str) else [int(t) for t in p] for p in listed]

    def _has_text(self, prompts: Prompt | Sequence[Prompt]) -> bool:
        return isinstance(prompts, str) or any(isinstance(prompt, str) for prompt in prompts)

    def _texts(self, rows: list[list[int]]) -> list[str]:
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
