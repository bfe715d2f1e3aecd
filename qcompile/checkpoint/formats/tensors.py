"""Small things that every format needs for the tensors it writes and the files it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

INDEX = "model.safetensors.index.json"


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy with storage of its own: safetensors writes no two tensors that share theirs."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def stored_names(files: Mapping[str, Mapping[str, Any]]) -> Collection[str]:
    """The full names of the tensors in the checkpoint; empty where no index says them."""
    names: Mapping[str, str] = files.get(INDEX, {}).get("weight_map", {})
    return names.keys()
