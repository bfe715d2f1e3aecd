"""What the files beside a decoder say of generation: where text ends, and how many tokens there may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.checkpoint.files.json_files import CONFIG, read_json
from qcompile.errors import GenerationError
from qcompile.messages import value

__all__ = ["GENAI_CONFIG", "GENERATION_CONFIG", "Settings", "model_file"]

GENERATION_CONFIG, GENAI_CONFIG, MODEL = "generation_config.json", "genai_config.json", "model.onnx"
_LIMITS = ("context_length", "max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Settings:
    """What is known of a model besides its graph.

    Attributes:
        ends: tokens that end a text. pad: the one that fills up rows. context: positions of the model, None for no
            known limit.
    """

    ends: frozenset[int] = frozenset()
    pad: int | None = None
    context: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """What `folder` says: the first of generation_config.json, genai_config.json and config.json that does."""
        contents = [_content(folder / name) for name in (GENERATION_CONFIG, GENAI_CONFIG, CONFIG)]
        ends = _tokens(_first(contents, ("eos_token_id",)), folder)
        pads = _tokens(_first(contents, ("pad_token_id",)), folder)
        limit = _first(contents[1:], _LIMITS)
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise GenerationError(f"{folder}: a context of {value(limit)} tokens is none")
        return cls(frozenset(ends), next(iter(pads), None), limit)


def model_file(path: Path) -> Path:
    """The ONNX file that `path`, one or a directory, stands for. Raises GenerationError."""
    if not path.is_dir():
        if not path.exists():
            raise GenerationError(f"there is nothing at {path}: name a directory that `qcompile export --cache` wrote")
        return path
    files = sorted(path.glob("*.onnx"))
    if path / MODEL in files:
        return path / MODEL
    if len(files) != 1:
        found = f"{len(files)} of them" if files else "none"
        raise GenerationError(f"{path} has no {MODEL}, and {found} in its place: name the ONNX file")
    return files[0]


def _content(path: Path) -> Mapping[str, Any]:
    """The JSON object; of genai_config.json and multimodal models the part about text."""
    if not path.is_file():
        return {}
    content = read_json(path, GenerationError)
    for part in ("model", "text_config"):
        if isinstance(content.get(part), dict):
            return {**content, **content[part]}
    return content


def _first(contents: list[Mapping[str, Any]], keys: tuple[str, ...]) -> Any:
    return next((c[key] for c in contents for key in keys if c.get(key) is not None), None)


def _tokens(given: Any, folder: Path) -> list[int]:
    tokens = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise GenerationError(f"{folder}: {value(given)} is no token that ends or fills up text")
    return tokens
