"""Formats of quantized Hugging Face checkpoints: one file each, and helpers for what they have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompile.checkpoint.files.json_files import CONFIG, HF_QUANT_CONFIG, read_json
from qcompile.checkpoint.formats.base import CheckpointFormat, Contents, Get, SchemeReader
from qcompile.checkpoint.formats.compressed_tensors import CompressedTensors
from qcompile.checkpoint.formats.fp8 import BlockFp8
from qcompile.checkpoint.formats.modelopt import ModelOpt
from qcompile.checkpoint.hub.config import quantization_config
from qcompile.errors import CheckpointError
from qcompile.messages import first_line, value

__all__ = ["FORMATS", "CheckpointFormat", "Contents", "Get", "SchemeReader", "format_called", "reader_of"]

_ALL = (BlockFp8(), ModelOpt(), ModelOpt(listed=True), CompressedTensors())
FORMATS: dict[str, CheckpointFormat] = {fmt.name: fmt for fmt in _ALL}


def format_called(name: str) -> CheckpointFormat:
    """The format called `name`. Raises `CheckpointError` for another name."""
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        raise CheckpointError(f"unknown checkpoint format {value(name)}; known: {', '.join(FORMATS)}") from None


def reader_of(config: Mapping[str, Any], directory: Path) -> SchemeReader:
    """The reader of a checkpoint, by its config.json, or hf_quant_config.json where only that says it.

    Args:
        config: the content of config.json.
        directory: where the other files are.

    Raises:
        CheckpointError: the checkpoint is not quantized, or in a way that is not known.
    """
    section, beside = quantization_config(config), directory / HF_QUANT_CONFIG
    files = {HF_QUANT_CONFIG: read_json(beside)} if beside.is_file() else {}
    if not section and not files:
        raise CheckpointError(
            f"{directory}: neither config.json has a quantization_config nor is there a {HF_QUANT_CONFIG}: the "
            "checkpoint is not quantized; load it as a float model and give it a recipe"
        )
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{directory / CONFIG}: quantization_config is a {type(section).__name__} and no object")
    # Model Optimizer's own section has no quant_method where it was copied from hf_quant_config.json
    named_by_producer = "modelopt" if not section or "producer" in section else None
    method = str(section.get("quant_method") or named_by_producer)
    # vLLM's names modelopt_fp4 and modelopt_mixed are the same format
    name = "modelopt" if method.startswith("modelopt") else method
    if name not in FORMATS:
        raise CheckpointError(
            f"{directory / CONFIG}: quantization_config has quant_method {value(section.get('quant_method'))}; "
            f"known: {', '.join(FORMATS)}"
        )
    try:
        return FORMATS[name].reader(section, files)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / CONFIG}: quantization_config cannot be read: {first_line(error)}"
        ) from error
