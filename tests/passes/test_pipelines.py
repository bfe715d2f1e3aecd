"""The passes that each kind of device gets."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from passes.lower.cpu.pipeline import cpu_pipeline
from passes.lower.cuda.pipeline import cuda_pipeline
from passes.lower.device import Device
from passes.pipelines import torch_pipeline

CPU, HOPPER = Device("cpu"), Device("cuda", (9, 0))


def said(passes: Any) -> list[Any]:
    """The passes of a pipeline with their arguments, in a form that compares."""
    return [(p.func, p.args, p.keywords) if isinstance(p, partial) else p for p in passes]


def test_a_cpu_gets_the_passes_of_the_cpu() -> None:
    assert said(torch_pipeline(CPU)) == said(cpu_pipeline(CPU))


@pytest.mark.parametrize("fast", [False, True])
def test_a_gpu_gets_those_of_cuda_and_the_accumulation_that_was_asked_for(fast: bool) -> None:
    found = said(torch_pipeline(HOPPER, fast_accumulation=fast))
    assert found == said(cuda_pipeline(HOPPER, fast_accumulation=fast))
    assert found != said(cuda_pipeline(HOPPER, fast_accumulation=not fast))
