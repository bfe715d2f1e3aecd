"""Formats of quantized Hugging Face checkpoints: one file each, and helpers for what they have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qcompile.checkpoint.formats.base import CheckpointFormat, Contents, Get, SchemeReader
from qcompile.checkpoint.formats.compressed_tensors import CompressedTensors
from qcompile.checkpoint.formats.fp8 import BlockFp8
from qcompile.checkpoint.formats.modelopt import ModelOpt
from qcompile.checkpoint.formats.tensors import INDEX
from qcompile.errors import CheckpointError

__all__ = ["FORMATS", "CheckpointFormat", "Contents", "Get", "SchemeReader", "format_called", "reader_of"]

FORMATS: dict[str, CheckpointFormat] = {f.name: f for f in (BlockFp8(), ModelOpt(), CompressedTensors())}

_HF_QUANT_CONFIG = "hf_quant_config.json"
_SINGLE_FILE = "model.safetensors"


def format_called(name: str) -> CheckpointFormat:
    """The format called `name`. Raises `CheckpointError` for another name."""
    try:
        return FORMATS[name]
    except KeyError:
        raise CheckpointError(f"unknown checkpoint format {name!r}; known: {', '.join(FORMATS)}") from None


def reader_of(config: Mapping[str, Any], directory: Path) -> SchemeReader:
    """The reader of a checkpoint, by its config.json, or hf_quant_config.json where only that says it.

    Args:
        config: the content of config.json.
        directory: where the other files are.

    Raises:
        CheckpointError: the checkpoint is not quantized, or in a way that is not known.
    """
    # multimodal models have the section one level down now and then
    section = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config") or {}
    files = _files(directory)
    if not section and _HF_QUANT_CONFIG not in files:
        raise CheckpointError(
            f"{directory}: neither config.json has a quantization_config nor is there a {_HF_QUANT_CONFIG}: the "
            "checkpoint is not quantized; load it as a float model and give it a recipe"
        )
    # Model Optimizer's own section has no quant_method where it was copied from hf_quant_config.json
    named_by_producer = "modelopt" if not section or "producer" in section else None
    method = str(section.get("quant_method") or named_by_producer)
    # vLLM's names modelopt_fp4 and modelopt_mixed are the same format
    name = "modelopt" if method.startswith("modelopt") else method
    if name not in FORMATS:
        raise CheckpointError(
            f"{directory / 'config.json'}: quantization_config has quant_method {section.get('quant_method')!r}; "
            f"known: {', '.join(FORMATS)}"
        )
    return FORMATS[name].reader(section, files)


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    """Content of the JSON files that readers look at; a checkpoint of one file gets the index that it has not."""
    files = {name: _json(directory / name) for name in (_HF_QUANT_CONFIG, INDEX) if (directory / name).is_file()}
    single = directory / _SINGLE_FILE
    if INDEX not in files and single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                files[INDEX] = {"weight_map": dict.fromkeys(file.keys(), _SINGLE_FILE)}
        except SafetensorError as e:
            raise CheckpointError(f"{single} cannot be read: {e}; it may be truncated, get the file again") from e
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
