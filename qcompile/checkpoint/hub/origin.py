"""Where the tensors and the configuration of a checkpoint come from: a directory, or a model in memory."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.checkpoint.files.headers import open_directory
from qcompile.checkpoint.files.json_files import CONFIG, HF_QUANT_CONFIG
from qcompile.checkpoint.files.tensors import HeldTensor, Stored
from qcompile.checkpoint.hub.adapters import MERGE
from qcompile.checkpoint.hub.config import (
    auto_config,
    import_transformers,
    is_quantized,
    meta_model,
    model_class,
    quantization_config,
    read_config,
)
from qcompile.checkpoint.hub.layout import Hub
from qcompile.checkpoint.hub.match import read_hub
from qcompile.checkpoint.hub.names import HubNames
from qcompile.checkpoint.hub.state import plain_state
from qcompile.checkpoint.hub.wrappers import architecture_of, plain_names, without_wrappers
from qcompile.compat.transformers import never_saved
from qcompile.errors import CheckpointError
from qcompile.schemes.layer import QuantizedLinear

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Origin:
    """An unquantized model.

    Attributes:
        stored: its tensors, by their names on the hub.
        config: the content of config.json.
        directory: whose other files are carried over; None for a model in memory.
        generation: the content of generation_config.json of a model in memory, if it has one.
        architecture: class of a model in memory, for readers that do not find it by its name in `config`.
        notices: what became of a model in memory before it was quantized.
    """

    hub: Hub
    stored: Mapping[str, Stored]
    config: Mapping[str, Any]
    directory: Path | None = None
    generation: Mapping[str, Any] | None = None
    architecture: type | None = None
    notices: tuple[str, ...] = ()


def open_origin(source: str | os.PathLike[str] | torch.nn.Module) -> Origin:
    """Headers, names and configuration of `source`; no weight of a directory is read.

    Raises:
        CheckpointError: it is no model of transformers, is damaged, or is quantized already.
    """
    if isinstance(source, torch.nn.Module):
        return _in_memory(source)
    directory = Path(source)
    if not directory.is_dir():
        raise CheckpointError(f"there is no directory {directory}")
    if (directory / _ADAPTER).is_file() and not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory} holds an adapter ({_ADAPTER}) and no model: {MERGE}, and save the result")
    content = read_config(directory, CheckpointError)
    model = _unquantized_model(directory, content)
    stored: dict[str, Stored] = dict(open_directory(directory))
    plain = plain_names(stored, HubNames(model))
    return Origin(read_hub(model, plain, str(directory)), plain, content, directory)


def _unquantized_model(directory: Path, content: Mapping[str, Any]) -> Any:
    """The model that config.json of `directory` describes, without memory for its weights."""
    if is_quantized(directory, content):
        section = quantization_config(content)
        method = section.get("quant_method") if isinstance(section, Mapping) else None
        shown = method if isinstance(method, str) and method.isprintable() else HF_QUANT_CONFIG
        raise CheckpointError(f"{directory} is quantized already ({shown[:200]}): save what it was made from")
    transformers = import_transformers(CheckpointError)
    config = auto_config(transformers, directory, CheckpointError)
    return meta_model(*model_class(transformers, config, CheckpointError), config, directory, CheckpointError)


def _in_memory(given: Any) -> Origin:
    model = without_wrappers(given)
    if not all(hasattr(model, attribute) for attribute in ("all_tied_weights_keys", "config", "can_generate")):
        raise CheckpointError(_no_model(model))
    cls = architecture_of(model)
    name = cls.__name__
    quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if quantized or getattr(model.config, "quantization_config", None):
        raise CheckpointError(f"{name} is quantized already: give the model that it was made from")
    config = json.loads(model.config.to_json_string())
    config.update(architectures=[name], dtype=str(model.dtype).removeprefix("torch."))
    architecture = meta_model(name, cls, type(model.config).from_dict(config), name, CheckpointError)
    plain = plain_state(model, architecture)
    if getattr(importlib.import_module("transformers"), name, None) is not cls:
        plain.notices.append(
            f"{cls.__module__}.{name} is no class of transformers: names and shapes are checked against it, and who"
            " reads the files needs its code"
        )
    loading: Any = importlib.import_module("transformers.core_model_loading")
    left = {*architecture.all_tied_weights_keys, *never_saved(model)}
    state = {key: tensor for key, tensor in plain.tensors.items() if key not in left}
    on_hub = loading.revert_weight_conversion(model, state)
    stored: dict[str, Stored] = {key: HeldTensor(key, tensor) for key, tensor in on_hub.items()}
    generation = getattr(model, "generation_config", None) if model.can_generate() else None
    return Origin(
        read_hub(architecture, stored, name),
        stored,
        config,
        generation=json.loads(generation.to_json_string()) if generation is not None else None,
        architecture=cls,
        notices=tuple(plain.notices),
    )


def _no_model(given: torch.nn.Module) -> str:
    """Why that one is not taken, and which part of it is."""
    text = f"{type(given).__name__} is no PreTrainedModel of transformers 5, and only those have a form on the hub"
    parts = [path for path, module in given.named_modules() if path and hasattr(module, "all_tied_weights_keys")]
    return f"{text}: give its part {parts[0]}" if parts else text
