"""Torch-TensorRT without a GPU: its import asks CUDA for one, and nothing that is tested here runs on one.

`.ci/run` has an environment with torch_tensorrt; everywhere else these tests are skipped, and nothing is imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

_DEVICE = SimpleNamespace(name="none", major=8, minor=9, total_memory=1 << 33)
_ANSWERS: dict[str, Any] = {
    "get_device_capability": (_DEVICE.major, _DEVICE.minor),
    "current_device": 0,
    "mem_get_info": (_DEVICE.total_memory, _DEVICE.total_memory),
    "get_device_properties": _DEVICE,
}


@pytest.fixture(scope="session", autouse=True)
def torch_tensorrt() -> Iterator[None]:
    if importlib.util.find_spec("torch_tensorrt") is None:
        pytest.skip("torch_tensorrt is not installed; .ci/run makes an environment with it")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            for name, answer in _ANSWERS.items():
                patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        yield
