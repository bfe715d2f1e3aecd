"""Where the tensors of the hub are in a model of transformers, whose modules are not always called as on the hub."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

import torch

from qcompile.errors import CheckpointError

TESTED = "5.23"


@dataclass(frozen=True)
class Place:
    """Where a tensor of the hub goes.

    Attributes:
        path: full name of the parameter or buffer.
        part: which of the matrices that are stacked below each other in it (gate, up).
        expert: which expert; None for a tensor that is the whole parameter.
        reason: why it cannot be cut out of the parameter or put into it as it is, if so.
    """

    path: str
    part: int = 0
    expert: int | None = None
    reason: str | None = None


class HubNames:
    """The renaming that transformers does when it loads `model` (its conversion mapping), for one name at a time."""

    def __init__(self, model: Any) -> None:
        self._state: dict[str, torch.Tensor] = model.state_dict()
        self._prefix: str = model.base_model_prefix
        try:
            loading = importlib.import_module("transformers.core_model_loading")
            mapping = importlib.import_module("transformers.conversion_mapping")
            self._rename, converter = loading.rename_source_key, loading.WeightConverter
            entries = mapping.get_model_conversion_mapping(model)
        except (ImportError, AttributeError) as error:
            version = importlib.import_module("transformers").__version__
            raise CheckpointError(
                f"transformers {version} has no conversion mapping to load quantized checkpoints by; {TESTED} has"
            ) from error
        self._renamings = [entry for entry in entries if not isinstance(entry, converter)]
        self._converters = [entry for entry in entries if isinstance(entry, converter)]

    def renamed(self, name: str) -> str:
        """What transformers calls the parameter that `name` belongs to, whether the model has it or not."""
        return self._convert(name)[0]

    def __contains__(self, name: object) -> bool:
        """Whether the model has a place for the tensor `name` of the hub."""
        return self._convert(str(name))[0] in self._state

    def place(self, name: str) -> Place | None:
        """Where the tensor `name` of the hub goes; None if the model has no place for it."""
        path, pattern = self._convert(name)
        if path not in self._state:
            return None
        if pattern is None:
            return Place(path)
        converter = next(entry for entry in self._converters if pattern in entry.source_patterns)
        if reason := _misfit(converter):
            return Place(path, reason=reason)
        found = re.search(pattern.replace("*.", r"(?P<expert>\d+)\."), self._rename(name, self._renamings, [])[0])
        if found is None:
            return Place(path, reason=f"transformers makes it out of {pattern}, which names no expert")
        return Place(path, converter.source_patterns.index(pattern), int(found["expert"]))

    def _convert(self, name: str) -> tuple[str, str | None]:
        path, pattern = self._rename(name, self._renamings, self._converters, self._prefix, self._state)
        if path not in self._state and name in self._state:  # the same exception as in transformers
            path, pattern = self._rename(name, [], [], self._prefix, self._state)
        return str(path), pattern


def _misfit(converter: Any) -> str | None:
    """Why the conversion is not `[E, sum of N, K]` from one `[N, K]` for each expert and part."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    stacked = [("MergeModulelist", 0), ("Concatenate", 1)]
    if len(converter.target_patterns) == 1 and steps == stacked[: min(len(converter.source_patterns), 2)]:
        return None
    return (
        f"transformers converts it by {', '.join(name for name, _ in steps)}, which codes and scales do not go through"
    )
