"""Hugging Face directories: the model that config.json describes, with or without its weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import SourceError
from qcompile.source.examples import example_inputs
from qcompile.source.model import Source


def load_directory(
    path: Path, *, random_weights: int | None, batch: int, sequence: int | None, submodule: str | None
) -> Source:
    """The model of `path`, on the CPU and in the dtype of its weights, with example inputs made from its config.

    The arguments are those of `load_source`. Only local files are read and no code of the directory is run.

    Raises:
        SourceError: no config.json, a model that transformers does not know, weights that are missing, incomplete or
            already quantized, or inputs that cannot be derived.
    """
    if not (path / "config.json").is_file():
        raise SourceError(f"{path} has no config.json, so it is no Hugging Face model directory")
    transformers = _import_transformers()
    config = _config(transformers, path)
    name, model_class = _model_class(transformers, config)
    if random_weights is not None:
        model = _made_up(transformers, model_class, config, random_weights, path)
    else:
        model = _with_weights(model_class, path)
    if submodule is not None:
        model, name = _part(model, submodule, path), f"{name}.{submodule}"
    inputs = example_inputs(model, name, batch, sequence)
    return Source(model.eval(), (), inputs, None, f"{path.resolve().name} ({name})")


def _import_transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise SourceError(
            "reading a Hugging Face directory needs transformers: pip install 'qcompile[transformers]'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _config(transformers: Any, path: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError, JSONDecodeError: all mean a config it cannot use
        raise SourceError(f"{path / 'config.json'}: transformers cannot use it: {_first_line(error)}") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise SourceError(
            f"{path}: its weights are already quantized ({method}); this version reads unquantized checkpoints only"
        )
    return config


def _model_class(transformers: Any, config: Any) -> tuple[str, Any]:
    """The class that the config names, AutoModel if it names none."""
    names = list(getattr(config, "architectures", None) or [])
    for name in names:
        if (found := getattr(transformers, name, None)) is not None:
            return name, found
    if names:
        raise SourceError(
            f"transformers {transformers.__version__} has no {names[0]}; a model with its own code is given as"
            " package.module:factory"
        )
    return f"{config.model_type} AutoModel", transformers.AutoModel


def _made_up(transformers: Any, model_class: Any, config: Any, seed: int, path: Path) -> torch.nn.Module:
    make = model_class.from_config if model_class is transformers.AutoModel else model_class._from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = make(config)
        except Exception as error:  # whatever the sizes in the config lead to
            raise SourceError(f"{path}: the model cannot be built from config.json: {_first_line(error)}") from error
    assert isinstance(model, torch.nn.Module)
    return model


def _with_weights(model_class: Any, path: Path) -> torch.nn.Module:
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise SourceError(f"{path} holds no weights (*.safetensors); to go on without, use --random-weights SEED")
    try:
        model, info = model_class.from_pretrained(
            path, local_files_only=True, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # safetensors, torch and transformers each have their own
        raise SourceError(f"{path}: the weights cannot be loaded: {_first_line(error)}") from error
    missing = sorted(info.get("missing_keys") or [])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise SourceError(
            f"{path}: the checkpoint lacks {shown}, which {type(model).__name__} needs; name the class that was saved"
            ' in config.json ("architectures")'
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


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
