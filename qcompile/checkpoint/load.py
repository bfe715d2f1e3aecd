"""Quantized Hugging Face checkpoints: `load_checkpoint` makes the model of transformers that runs on their codes.

What is quantized is read here; what is not is left to `from_pretrained`, which knows the renaming, conversion, tying
and dtypes of each model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from qcompile.capture import experts
from qcompile.checkpoint.files.tensors import FLOATS
from qcompile.checkpoint.formats import reader_of
from qcompile.checkpoint.hub.config import (
    auto_config,
    import_transformers,
    is_quantized,
    meta_model,
    model_class,
    quiet,
    read_config,
    unquantized,
)
from qcompile.checkpoint.read.kv_cache import attach_kv_scales
from qcompile.checkpoint.read.quantized_parts import QuantizedParts, read_quantized_parts
from qcompile.checkpoint.read.store import TensorStore
from qcompile.errors import CheckpointError, QCompileError
from qcompile.messages import first_line, some

__all__ = ["is_quantized_checkpoint", "load_checkpoint"]

logger = logging.getLogger("qcompile")

_OF_QUANTIZERS = ("scale", "scale_inv", "packed", "zero_point", "g_idx", "amax")


def is_quantized_checkpoint(directory: str | Path) -> bool:
    """Whether config.json, or the file that Model Optimizer writes beside it, says that the weights are quantized."""
    path = Path(directory)
    return is_quantized(path, read_config(path, CheckpointError))


def load_checkpoint(directory: str | Path) -> torch.nn.Module:
    """The model of a directory in one of the formats `fp8`, `modelopt` and `compressed-tensors`, on the CPU.

    Its quantized layers are `QuantizedLinear` with the codes and scales of the files; the experts of a mixture run as
    `qcompile.capture.experts` has it, and FP8 key/value caches are quantized and dequantized in front of the attention.
    The rest is as `from_pretrained` loads it. `qcompile.import_quantized` makes a program of it.

    Args:
        directory: with config.json and safetensors. Only local files are read, and no code of the directory is run.

    Raises:
        CheckpointError: names the file and the tensor that is missing, broken or not understood; or transformers is not
            installed or does not know the model.
    """
    path = Path(directory)
    content = read_config(path, CheckpointError)
    transformers = import_transformers(CheckpointError)
    reader = reader_of(content, path)
    store = TensorStore(path)
    config = unquantized(auto_config(transformers, path, CheckpointError))
    model = meta_model(*model_class(transformers, config, CheckpointError), config, path, CheckpointError)
    parts = read_quantized_parts(model, reader, store)
    if not parts.modules:
        raise CheckpointError(f"{path}: the configuration speaks of quantized weights, and the files hold none")
    _check_floats(parts, store)
    loaded = _with_floats(type(model), _untied(config, model, parts, path), parts, store)
    parts.put_into(loaded)
    attach_kv_scales(loaded, parts.kv_scales)
    experts.make_dense(loaded)
    assert isinstance(loaded, torch.nn.Module)
    return loaded


def _check_floats(parts: QuantizedParts, store: TensorStore) -> None:
    """Nothing that is left may be codes: transformers would take them for values."""
    state = parts.model.state_dict()
    for name in sorted(store.left):
        place = parts.names.place(name)
        if place and state[place.path].is_floating_point() and store[name].dtype not in FLOATS:
            raise CheckpointError(
                f"{store[name].where} has dtype {str(store[name].dtype).removeprefix('torch.')}, and the configuration"
                f" says that {name.rpartition('.')[0]} is not quantized (or it is no linear layer, which is"
                " not supported)"
            )


def _untied(config: Any, model: Any, parts: QuantizedParts, path: Path) -> Any:
    """The config for a head with codes of its own beside an embedding in floating point."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for target, source in tied.items():
        quantized = [name.removesuffix(".weight") in parts.modules for name in (target, source)]
        if not any(quantized):
            continue
        if quantized[1] or not getattr(config, "tie_word_embeddings", False):
            raise CheckpointError(f"{path}: {source} is quantized, and {target} is tied to it, which is not supported")
        logger.info("%s has codes of its own: it is not tied to %s", target, source)
        config.tie_word_embeddings = False
    return config


def _with_floats(cls: Any, config: Any, parts: QuantizedParts, store: TensorStore) -> Any:
    """The model with everything but its quantized parts."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        parts.make_room_in(self)

    # a subclass, so that transformers does not look for the weights that are quantized
    roomy = type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})
    floats = {name: store.later(name) for name in store.left}
    dtype = getattr(config, "dtype", None) or _first_float(store)
    try:
        with quiet():
            model, info = roomy.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=config,
                state_dict=floats,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # it is told by `_check_loaded`, with the name of the tensor
            )
    except QCompileError:
        raise
    except Exception as error:  # torch and transformers each have their own
        raise CheckpointError(f"{store.directory}: the weights cannot be loaded: {first_line(error)}") from error
    model.__class__ = cls
    _check_loaded(info, parts, store)
    return model.requires_grad_(False)  # its operators are for inference


def _first_float(store: TensorStore) -> torch.dtype:
    return next((store[name].dtype for name in store if store[name].dtype in FLOATS), torch.float32)


def _check_loaded(info: dict[str, Any], parts: QuantizedParts, store: TensorStore) -> None:
    """Every parameter was in the files in its shape, and every tensor of a quantizer in the files was read."""
    if missing := sorted(info.get("missing_keys") or []):
        raise CheckpointError(
            f"{store.directory}: no file holds {some(missing)}, which {type(parts.model).__name__} needs"
        )
    for name, found, wanted in info.get("mismatched_keys") or []:
        raise CheckpointError(
            f"{store.directory}: {name} is {list(found)}, and the model that config.json describes has {list(wanted)}"
        )
    unexpected = set(info.get("unexpected_keys") or [])
    ignored = [name for name in sorted(store.left) if parts.names.renamed(name) in unexpected]
    for name in ignored:
        if store[name].dtype not in FLOATS or name.endswith(_OF_QUANTIZERS):
            raise CheckpointError(
                f"{store[name].where} belongs to a quantized layer, and nothing reads it: the configuration says that"
                f" {name.rpartition('.')[0]} is not quantized or in another way, or the model has no such linear layer"
            )
    if ignored:
        logger.info("%s: the model has no place for %s", store.directory, ", ".join(ignored))
