"""What config.json of a Hugging Face directory says: the transformers config, the class of the model, its modules."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qcompile.checkpoint.files.json_files import CONFIG, HF_QUANT_CONFIG, read_json
from qcompile.checkpoint.files.links import check_inside
from qcompile.compat.transformers import IMPLEMENTATIONS, from_config
from qcompile.errors import QCompileError
from qcompile.messages import cut, first_line, value
from qcompile.process import alone

_MOST_LAYERS, _MOST_EXPERTS = 1_000, 10_000
_COUNT = re.compile("(layer|block|expert|depth|stage)s?(_count)?$")  # num_hidden_layers, n_layer, n_routed_experts


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
    """The content of config.json in the directory `path`.

    Raises:
        QCompileError: an `error`; there is none, it is no JSON object, or it or a file beside it that says the same is
            a link that leads out of the directory.
    """
    if not (path / CONFIG).is_file():
        raise error(f"{path} has no config.json, so it is no Hugging Face model directory")
    for name in (CONFIG, HF_QUANT_CONFIG):
        check_inside(path / name, path, error)
    content = read_json(path / CONFIG, error)
    _check_counts(content, path / CONFIG, error)
    return content


def _check_counts(content: object, file: Path, error: type[QCompileError], key: str = "") -> None:
    """Refuse more layers than any model has: transformers would make lists, and modules, of that many."""
    if isinstance(content, dict):
        for name, part in content.items():
            _check_counts(part, file, error, name)
    elif isinstance(content, list):
        for part in content:
            _check_counts(part, file, error, key)
    elif isinstance(content, int | float) and (found := _COUNT.search(key)):
        most = _MOST_EXPERTS if found[1] == "expert" else _MOST_LAYERS
        if content > most:
            raise error(f"{file}: {cut(key)} is {value(content)}, more than {most}, which no model has")


def quantization_config(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """That section of config.json, which multimodal models have one level down now and then; empty without one."""
    text = content.get("text_config")
    below = text.get("quantization_config") if isinstance(text, Mapping) else None
    return content.get("quantization_config") or below or {}


def is_quantized(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether config.json, or the file that Model Optimizer writes beside it, says that the weights are quantized."""
    return bool(quantization_config(content)) or (path / HF_QUANT_CONFIG).is_file()


def auto_config(transformers: Any, path: Path, error: type[QCompileError]) -> Any:
    """The config object that transformers makes of the directory.

    Raises:
        QCompileError: an `error`; transformers cannot use it, or it asks for code of a repository of the hub, or for
            more layers than any model has.
    """
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as cause:  # OSError, ValueError, KeyError, JSONDecodeError: all mean a config it cannot use
        raise error(f"{path / CONFIG}: transformers cannot use it: {first_line(cause)}") from cause
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for key in IMPLEMENTATIONS:
            chosen = getattr(part, key, None)
            if isinstance(chosen, str) and not chosen.isidentifier():  # transformers takes "owner/name" for a kernel
                raise error(f"{path / CONFIG} asks for {value(chosen)} as {key[1:]}, which is no part of transformers")
    return config


def unquantized(config: Any) -> Any:
    """The config without what would make transformers quantize the model."""
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for key in ("quantization_config", "compression_config"):
            with contextlib.suppress(AttributeError):
                delattr(part, key)
    return config


def model_class(transformers: Any, config: Any, error: type[QCompileError]) -> tuple[str, Any]:
    """The class that the config names, AutoModel if it names none. Raises `error` for what is no model class."""
    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise error(f"config.json: architectures is {value(names)}, and has to be a list of names of classes")
    for name in names:
        try:
            found = getattr(transformers, name, None)
        except Exception as cause:  # the module of that class is imported only now
            raise error(f"transformers cannot import {value(name)}: {first_line(cause)}") from cause
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return name, found
    if names:
        raise error(
            f"transformers {transformers.__version__} has no {cut(names[0])} among its models; a model with its own"
            " code is given as package.module:factory"
        )
    return f"{config.model_type} AutoModel", transformers.AutoModel


def meta_model(name: str, found: Any, config: Any, path: Path | str, error: type[QCompileError]) -> Any:
    """A model of the class `found`, without memory for its weights. Raises `error` with the reason of transformers."""
    try:
        with quiet(), torch.device("meta"):
            return from_config(found, config)
    except Exception as cause:  # whatever the sizes in the config lead to
        raise error(f"{path}: {name} cannot be built from config.json: {first_line(cause)}") from cause
