"""Each test starts with nothing compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qcompile.dynamo import left, registry


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    registry._KNOWN.clear()  # torch 2.11 keeps graphs of functions through a reset
    left._SEEN.clear(), left._KNOWN.clear()
    yield
    torch._dynamo.reset()
