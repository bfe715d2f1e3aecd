"""Run with a Python that has TensorRT Edge-LLM (0.11.0): the models and the weight loader of its ONNX exporter.

It needs no kernel. Its layers hold the stored tensors as they are, bfloat16 aside, until it repacks them for plugins;
so they are looked at just before that, and what repacking raises is an error like any other.
"""

from __future__ import annotations

from typing import Any

import tensorrt_edgellm.model
import torch
from common import lost, report

_load_weights = tensorrt_edgellm.model.load_weights
_found: list[str] = []


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.dtype == torch.bfloat16 else tensor


def _observed(model: torch.nn.Module, directory: str, **options: Any) -> None:
    """`load_weights`, which also notes what is lost, and which tensors of the model the checkpoint did not set."""
    before = _tensors(model)

    def look(model: torch.nn.Module) -> None:
        now = _tensors(model)
        _found.extend(lost(directory, now.values(), _half))
        # the loader sets an attribute to a new tensor; no checkpoint has a scale of queries
        _found.extend(f"{name} (not set)" for name, t in now.items() if t is before[name] and ".q_scale" not in name)

    _load_weights(model, directory, **{**options, "pre_repack_hook": look})


tensorrt_edgellm.model.load_weights = _observed


def judge(directory: str) -> list[str]:
    _found.clear()
    tensorrt_edgellm.AutoModel.from_pretrained(directory)
    return list(_found)


report(judge)
