"""What config.json of a Hugging Face directory says: the transformers config, the class of the model, its modules."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qcompile.checkpoint.files.json_files import CONFIG, HF_QUANT_CONFIG, read_json
from qcompile.errors import QCompileError
from qcompile.messages import first_line
from qcompile.process import alone


def import_transformers(error: type[QCompileError], *, silent: bool = False) -> Any:
    """The package. Raises `error` where it is not installed.

    Args:
        silent: for good, in a process that is all ours; `quiet` is for those of others.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as cause:
        raise error(
            "reading a Hugging Face directory needs transformers: pip install 'qcompile[transformers]'"
        ) from cause
    if silent:
        _silence(transformers.utils.logging)
    return transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers logs and its bars; and alone, as it builds models in a default dtype of the process."""
    with alone():
        logging = importlib.import_module("transformers.utils.logging")
        level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        try:
            _silence(logging)
            yield
        finally:
            logging.set_verbosity(level)
            if has_bars:
                logging.enable_progress_bar()


def _silence(logging: Any) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_config(path: Path, error: type[QCompileError]) -> dict[str, Any]:
    """The content of config.json in the directory `path`. Raises `error` if there is none, or it is no JSON object."""
    if not (path / CONFIG).is_file():
        raise error(f"{path} has no config.json, so it is no Hugging Face model directory")
    return read_json(path / CONFIG, error)


def quantization_config(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """That section of config.json, which multimodal models have one level down now and then; empty without one."""
    return content.get("quantization_config") or (content.get("text_config") or {}).get("quantization_config") or {}


def is_quantized(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether config.json, or the file that Model Optimizer writes beside it, says that the weights are quantized."""
    return bool(quantization_config(content)) or (path / HF_QUANT_CONFIG).is_file()


def auto_config(transformers: Any, path: Path, error: type[QCompileError]) -> Any:
    """The config object that transformers makes of the directory. Raises `error` with its reason."""
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as cause:  # OSError, ValueError, KeyError, JSONDecodeError: all mean a config it cannot use
        raise error(f"{path / CONFIG}: transformers cannot use it: {first_line(cause)}") from cause


def unquantized(config: Any) -> Any:
    """The config without what would make transformers quantize the model."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for key in ("quantization_config", "compression_config"):
            with contextlib.suppress(AttributeError):
                delattr(part, key)
    return config


def model_class(transformers: Any, config: Any, error: type[QCompileError]) -> tuple[str, Any]:
    """The class that the config names, AutoModel if it names none. Raises `error` for one that is not known."""
    names = list(getattr(config, "architectures", None) or [])
    for name in names:
        if (found := getattr(transformers, name, None)) is not None:
            return name, found
    if names:
        raise error(
            f"transformers {transformers.__version__} has no {names[0]}; a model with its own code is given as"
            " package.module:factory"
        )
    return f"{config.model_type} AutoModel", transformers.AutoModel


def meta_model(name: str, found: Any, config: Any, path: Path | str, error: type[QCompileError]) -> Any:
    """A model of the class `found`, without memory for its weights. Raises `error` with the reason of transformers."""
    try:
        with quiet(), torch.device("meta"):
            return found._from_config(config) if hasattr(found, "_from_config") else found.from_config(config)
    except Exception as cause:  # whatever the sizes in the config lead to
        raise error(f"{path}: {name} cannot be built from config.json: {first_line(cause)}") from cause
