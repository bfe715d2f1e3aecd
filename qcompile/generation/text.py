"""Text to tokens and back, by the tokenizer of a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompile.checkpoint.files.links import check_inside
from qcompile.checkpoint.hub.config import import_transformers
from qcompile.errors import GenerationError
from qcompile.messages import first_line

__all__ = ["Streamer", "encode", "load_tokenizer"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_CUT = "\ufffd"  # what a tokenizer makes of a part of a character


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of `folder`. Nothing of it is run. Raises GenerationError, which says what it lacks."""
    if not any((folder / name).is_file() for name in _FILES):
        raise GenerationError(
            f"{folder} has no tokenizer ({', '.join(_FILES)}): copy it from where the model is from, or give tokens in"
            " the place of text"
        )
    for file in filter(Path.is_file, folder.iterdir()):
        check_inside(file, folder, GenerationError)
    transformers = import_transformers(GenerationError)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, KeyError, and what `tokenizers` raises
        raise GenerationError(f"the tokenizer of {folder} cannot be loaded: {first_line(error)}") from error


def encode(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """Token ids of a prompt; with `chat` as what a user says, in the words of the model's template."""
    try:
        if chat:
            if not getattr(tokenizer, "chat_template", None):
                raise GenerationError("the tokenizer has no chat template: give the prompt as it is, without chat")
            said = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return [int(token) for token in tokenizer(prompt, add_special_tokens=not chat)["input_ids"]]
    except GenerationError:
        raise
    except Exception as error:  # a template that refuses, text that is no Unicode
        raise GenerationError(f"the tokenizer fails on the prompt: {first_line(error)}") from error


class Streamer:
    """Tokens, one after another, as pieces of text: none of them ends within a character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start, self._told = 0, ""  # text is decoded from a token on, as what stands before it can change it

    def add(self, tokens: Sequence[int]) -> str:
        """What `tokens` add to the text."""
        self._tokens += tokens
        text = self._decoded()
        if text.endswith(_CUT):
            return ""
        new = text[len(self._told) :]
        self._start, self._told = max(self._start, len(self._tokens) - 4), ""
        self._told = self._decoded()
        return new

    def end(self) -> str:
        """What is left, a character without its end included."""
        text = self._decoded()
        new, self._told = text[len(self._told) :], text
        return new

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self._tokens[self._start :], skip_special_tokens=True))
