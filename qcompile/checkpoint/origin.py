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

from qcompile.checkpoint.headers import open_directory, read_json
from qcompile.checkpoint.hub import read_hub
from qcompile.checkpoint.layout import Hub
from qcompile.checkpoint.stored import HeldTensor, Stored
from qcompile.errors import CheckpointError
from qcompile.layer import QuantizedLinear


@dataclass(frozen=True)
class Origin:
    """An unquantized model.

    Attributes:
        stored: its tensors, by their names on the hub.
        config: the content of config.json.
        directory: whose other files are carried over; None for a model in memory.
        generation: the content of generation_config.json of a model in memory, if it has one.
    """

    hub: Hub
    stored: Mapping[str, Stored]
    config: Mapping[str, Any]
    directory: Path | None = None
    generation: Mapping[str, Any] | None = None


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
    model = _meta_model(directory)
    stored: dict[str, Stored] = dict(open_directory(directory))
    return Origin(read_hub(model, stored, str(directory)), stored, read_json(directory / "config.json"), directory)


def _meta_model(directory: Path) -> Any:
    """The model that config.json of `directory` describes, without memory for its weights.

    Raises:
        CheckpointError: there is no config.json, it is quantized already, or transformers does not know the model.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory} has no config.json, so it is no Hugging Face model directory")
    content = read_json(directory / "config.json")
    if (section := content.get("quantization_config")) or (directory / "hf_quant_config.json").is_file():
        method = section.get("quant_method") if isinstance(section, dict) else None
        raise CheckpointError(
            f"{directory} is quantized already ({method or 'hf_quant_config.json'}): save what it was made from"
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError("checkpoints need transformers: pip install 'qcompile[transformers]'") from error
    names = content.get("architectures") or []
    found = next((cls for name in names if (cls := getattr(transformers, name, None)) is not None), None)
    if names and found is None:
        raise CheckpointError(f"{directory / 'config.json'}: transformers {transformers.__version__} has no {names[0]}")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return transformers.AutoModel.from_config(config) if found is None else found._from_config(config)
    except Exception as error:  # OSError, ValueError, KeyError ...: all mean a config it cannot use
        raise CheckpointError(f"{directory / 'config.json'}: transformers cannot use it: {error}") from error


def _in_memory(model: Any) -> Origin:
    name = type(model).__name__
    if not all(hasattr(model, attribute) for attribute in ("all_tied_weights_keys", "config", "can_generate")):
        raise CheckpointError(f"{name} is no PreTrainedModel of transformers 5, and only those have a form on the hub")
    quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if quantized or getattr(model.config, "quantization_config", None):
        raise CheckpointError(f"{name} is quantized already: give the model that it was made from")
    loading: Any = importlib.import_module("transformers.core_model_loading")
    left = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in left}
    if nowhere := [key for key, tensor in state.items() if tensor.is_meta]:
        raise CheckpointError(f"{name}: {nowhere[0]} is on the meta device and has no values")
    on_hub = loading.revert_weight_conversion(model, state)
    stored: dict[str, Stored] = {key: HeldTensor(key, tensor) for key, tensor in on_hub.items()}
    config = json.loads(model.config.to_json_string())
    config.update(architectures=[name], dtype=str(model.dtype).removeprefix("torch."))
    generation = getattr(model, "generation_config", None) if model.can_generate() else None
    return Origin(
        read_hub(model, stored, name),
        stored,
        config,
        generation=json.loads(generation.to_json_string()) if generation is not None else None,
    )
