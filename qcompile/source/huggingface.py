"""Hugging Face directories: the model that config.json describes, with or without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qcompile.checkpoint.files.headers import weight_map
from qcompile.checkpoint.files.json_files import CONFIG, INDEX
from qcompile.checkpoint.files.links import check_inside
from qcompile.checkpoint.hub.config import auto_config, import_transformers, model_class, read_config
from qcompile.checkpoint.load import is_quantized_checkpoint, load_checkpoint
from qcompile.compat.transformers import from_config
from qcompile.errors import CheckpointError, SourceError
from qcompile.messages import first_line, some
from qcompile.remedy import remedy_of
from qcompile.source.examples import Sizes, example_inputs
from qcompile.source.model import Source

_INDEXES = (INDEX, "pytorch_model.bin.index.json")


def load_directory(
    path: Path, *, random_weights: int | None, sizes: Sizes, submodule: str | None, declared: bool
) -> Source:
    """The model of `path`, on the CPU and in the dtype of its weights, with example inputs made from its config.

    A quantized checkpoint becomes a model with quantized layers (`qcompile.checkpoint.load`).

    The arguments are those of `load_source`; `declared`: there will be other example inputs, and need be none. Only
    local files are read and no code of the directory is run.

    Raises:
        SourceError: no config.json, a model that transformers does not know, weights that are missing or incomplete,
            random weights for a quantized checkpoint, or inputs that cannot be derived.
        CheckpointError: a quantized checkpoint that cannot be read.
    """
    read_config(path, SourceError)
    transformers = import_transformers(SourceError, silent=True)
    config = auto_config(transformers, path, SourceError)
    name, found = model_class(transformers, config, SourceError)
    if random_weights is None:
        model = load_checkpoint(path) if is_quantized_checkpoint(path) else _with_weights(found, path, config)
    elif is_quantized_checkpoint(path):
        raise SourceError(
            f"{path}: config.json says that its weights are quantized, so they cannot be made up: leave random weights"
            " out, or take quantization_config out of a copy of it"
        )
    else:
        model = _made_up(transformers, found, config, random_weights, path)
    if submodule is not None:
        model, name = _part(model, submodule, path), f"{name}.{submodule}"
    try:
        inputs = example_inputs(model, name, sizes)
    except SourceError as error:
        if not declared and remedy_of(error).options:
            raise
        if not declared:
            raise SourceError(f"{error}, or declare its inputs with --input NAME=SHAPE:DTYPE") from error
        inputs = {}
    return Source(model.eval(), (), inputs, None, f"{path.resolve().name} ({name})")


def _made_up(transformers: Any, model_class: Any, config: Any, seed: int, path: Path) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = from_config(model_class, config)
        except Exception as error:  # whatever the sizes in the config lead to
            raise SourceError(f"{path}: the model cannot be built from config.json: {first_line(error)}") from error
    assert isinstance(model, torch.nn.Module)
    return model


def _check_weights(path: Path, config: Any) -> None:
    """transformers follows an index to any file, and every link; here each has to stay in the directory."""
    files = [file for pattern in ("*.safetensors", "*.bin", "*.json") for file in path.glob(pattern)]
    for index in filter(Path.is_file, (path / name for name in _INDEXES)):
        try:
            files += [path / file for file in weight_map(index).values()]
        except CheckpointError as error:
            raise SourceError(str(error)) from error
    named = getattr(config, "transformers_weights", None)  # the file to take instead
    if named is not None and (not isinstance(named, str) or Path(named).name != named):
        raise SourceError(f"{path / CONFIG} names {str(named)[:200]!r}, which is no file of this directory")
    for file in files:
        check_inside(file, path, SourceError)


def _with_weights(model_class: Any, path: Path, config: Any) -> torch.nn.Module:
    _check_weights(path, config)
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise SourceError(f"{path} holds no weights (*.safetensors); to go on without, use --random-weights SEED")
    try:
        model, info = model_class.from_pretrained(
            path, local_files_only=True, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # safetensors, torch and transformers each have their own
        raise SourceError(f"{path}: the weights cannot be loaded: {first_line(error)}") from error
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        raise SourceError(
            f"{path}: the checkpoint lacks {some(missing)}, which {type(model).__name__} needs; name the class that was"
            ' saved in config.json ("architectures")'
        )
    assert isinstance(model, torch.nn.Module)
    return model


def _part(model: torch.nn.Module, submodule: str, path: Path) -> torch.nn.Module:
    try:
        return model.get_submodule(submodule)
    except AttributeError as error:
        parts = [name for name, child in model.named_modules() if hasattr(child, "main_input_name") and name]
        raise SourceError(
            f"{path}: the model has no part {submodule!r}; it has {', '.join(parts) or 'none'}"
        ) from error
