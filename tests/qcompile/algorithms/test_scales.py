"""Scales: which quantizers have a constant one, and what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qcompile.algorithms.scales import has_constant, scale_of
from qcompile.recipe import QuantizerConfig

FP8 = QuantizerConfig("fp8", "per_tensor", (), dynamic=False)
NVFP4 = QuantizerConfig("nvfp4", "per_block", (1, 16), dynamic=True)


def test_an_nvfp4_activation_has_a_constant_above_the_scales_of_run_time() -> None:
    assert has_constant(FP8) and has_constant(NVFP4) and has_constant(replace(NVFP4, dynamic=False))
    assert not has_constant(QuantizerConfig("fp8", "per_token", (), dynamic=True))


@pytest.mark.parametrize(("config", "largest"), [(FP8, 448), (NVFP4, 6 * 448)], ids=["fp8", "nvfp4"])
def test_a_scale_is_amax_over_the_largest_number(config: QuantizerConfig, largest: int) -> None:
    amax = torch.tensor(3.7)
    assert torch.equal(scale_of(amax, config, False), amax / largest)
    rounded = scale_of(amax, config, True)
    assert torch.log2(rounded) == torch.log2(amax / largest).ceil()
    for power_of_two in (False, True):
        assert scale_of(torch.tensor(0.0), config, power_of_two) == 1
        least = scale_of(torch.tensor(1e-37), config, power_of_two)
        assert least == torch.finfo(torch.float32).tiny and torch.isfinite(1 / least)
