"""Settings that all tests share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Compiling and exporting inside an example makes its first run slow, which says nothing about the code under test.
settings.register_profile("qcompile", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("qcompile")

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it does


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
