"""What was written is loaded once, by names and shapes: what a reader of its format would miss or not take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.checkpoint.files.json_files import CONFIG
from qcompile.checkpoint.files.tensors import Shaped
from qcompile.checkpoint.formats import reader_of
from qcompile.checkpoint.formats.merged import describe
from qcompile.checkpoint.hub.config import (
    auto_config,
    import_transformers,
    meta_model,
    model_class,
    read_config,
    unquantized,
)
from qcompile.checkpoint.hub.match import read_hub
from qcompile.checkpoint.read.quantized_parts import read_quantized_parts
from qcompile.checkpoint.read.store import HeaderStore
from qcompile.errors import CheckpointError
from qcompile.messages import some
from qcompile.schemes.scheme import Scheme


@dataclass(frozen=True)
class _Weight:
    """A quantized weight in the shape that the architecture has for it."""

    where: str
    shape: tuple[int, ...]


def check_written(
    directory: Path, schemes: Mapping[str, Scheme], strange: Collection[str], architecture: type | None
) -> None:
    """Compare the files in `directory` with the architecture that their config.json names.

    The reader of the format has to find each of `schemes`, with codes and scales in their dtypes and shapes; all other
    tensors have to be those of the architecture, which may lack none. Read are headers, and tensors of one element.

    Args:
        schemes: quantized layer, as the hub calls it -> what was to be written of it.
        strange: tensors that the source had and the architecture has not.
        architecture: class of a model in memory; taken where transformers has none of its name.

    Raises:
        CheckpointError: says what does not fit.
    """
    try:
        _check(directory, schemes, strange, architecture)
    except CheckpointError as error:
        raise CheckpointError(f"what was written could not be read back, so it was removed again; {error}") from error


def _check(directory: Path, schemes: Mapping[str, Scheme], strange: Collection[str], architecture: type | None) -> None:
    model = _on_meta(directory, architecture)
    store = HeaderStore(directory)
    reader = reader_of(read_config(directory, CheckpointError), directory)
    parts = read_quantized_parts(model, reader, store, kv_scales=False)
    wanted = {name: scheme for name, scheme in schemes.items() if store.under(name)}
    for name in {**wanted, **parts.layers}:
        found = parts.layers[name][0] if name in parts.layers else None
        if wanted.get(name) != found:
            raise CheckpointError(
                f"{name} was to be {describe(wanted.get(name))}, and the configuration says {describe(found)}"
            )
    tensors: dict[str, Shaped] = {name: store[name] for name in store.left}
    for name, (_, shape) in parts.layers.items():
        tensors[f"{name}.weight"] = _Weight(f"{directory}: {name}", shape)
    if foreign := sorted(set(read_hub(model, tensors, str(directory)).unknown) - set(strange)):
        raise CheckpointError(f"{directory}: {type(model).__name__} has no place for {some(foreign)}")


def _on_meta(directory: Path, architecture: Any) -> Any:
    """The model that config.json describes."""
    transformers = import_transformers(CheckpointError)
    if architecture is None or getattr(transformers, architecture.__name__, None) is architecture:
        config = auto_config(transformers, directory, CheckpointError)
        name, architecture = model_class(transformers, config, CheckpointError)
    else:
        name, config = architecture.__name__, architecture.config_class.from_json_file(directory / CONFIG)
    return meta_model(name, architecture, unquantized(config), directory, CheckpointError)
