"""What config.json of a Hugging Face directory says: the transformers config, the class of the model, its modules."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qcompile.checkpoint.files.json_files import CONFIG, HF_QUANT_CONFIG, read_json
from qcompile.checkpoint.files.links import check_inside
from qcompile.errors import QCompileError
from qcompile.messages import first_line

_LAYERS = ("layers", "n_layer", "num_layer", "depth", "depths", "blocks", "block_count")  # ends of keys
_MOST_LAYERS = 1_000


def import_transformers(error: type[QCompileError]) -> Any:
    """The package, silenced. Raises `error` where it is not installed."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as cause:
        raise error(
            "reading a Hugging Face directory needs transformers: pip install 'qcompile[transformers]'"
        ) from cause
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


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
    return read_json(path / CONFIG, error)


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
    for name, count in _counts(read_json(path / CONFIG, error)):
        if count > _MOST_LAYERS:  # Python makes an object of each, before it is seen that no file has their weights
            raise error(f"{path / CONFIG}: {name} is {str(count)[:30]}, and at most {_MOST_LAYERS} layers are built")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as cause:  # OSError, ValueError, KeyError, JSONDecodeError: all mean a config it cannot use
        raise error(f"{path / CONFIG}: transformers cannot use it: {first_line(cause)}") from cause
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for key in ("_attn_implementation", "_experts_implementation"):
            chosen = getattr(part, key, None)
            if isinstance(chosen, str) and not chosen.isidentifier():  # transformers takes "owner/name" for a kernel
                raise error(f"{path / CONFIG} asks for {chosen[:200]!r} as {key[1:]}, which is no part of transformers")
    return config


def _counts(content: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """How many layers config.json and its parts speak of."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif name.endswith(_LAYERS):
            counts = value if isinstance(value, list) else [value]
            yield from ((name, count) for count in counts if isinstance(count, int | float))


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
        raise error(f"config.json: architectures is {str(names)[:200]!r}, and no list of names")
    for name in names:
        try:
            found = getattr(transformers, name, None)
        except Exception as cause:  # the module of that class is imported only now
            raise error(f"transformers cannot import {name[:200]!r}: {first_line(cause)}") from cause
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return name, found
    if names:
        shown = names[0] if names[0].isidentifier() else repr(names[0])
        raise error(
            f"transformers {transformers.__version__} has no {shown[:200]} among its models; a model with its own code"
            " is given as package.module:factory"
        )
    return f"{config.model_type} AutoModel", transformers.AutoModel


def meta_model(name: str, found: Any, config: Any, path: Path | str, error: type[QCompileError]) -> Any:
    """A model of the class `found`, without memory for its weights. Raises `error` with the reason of transformers."""
    try:
        with torch.device("meta"):
            return found._from_config(config) if hasattr(found, "_from_config") else found.from_config(config)
    except Exception as cause:  # whatever the sizes in the config lead to
        raise error(f"{path}: {name} cannot be built from config.json: {first_line(cause)}") from cause
