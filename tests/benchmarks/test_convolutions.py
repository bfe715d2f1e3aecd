"""The benchmarks of convolutions in their smallest form: what they count, and what they call a miss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.convolution_models import Row, measure
from benchmarks.convolutions import FOLDS, Data, Network, joined, run


def test_networks_are_judged_together_and_the_engine_by_its_layers() -> None:
    right, wrong = torch.ones(1000, dtype=torch.bool), torch.arange(1000) >= 4
    one = Network(right, wrong, right, quantized=9, convolutions=9, low_precision=9, kernels=18)
    row = joined("fp8", [one, replace(one, unquantized=wrong.flip(0), program=wrong.flip(0))], 12)
    assert row.ok and (row.images, row.lost, row.won) == (2000, 4, 0)
    assert (row.unquantized, row.program, row.onnxruntime) == pytest.approx((99.8, 99.6, 100.0))
    assert not joined("fp8", [one], 12).ok
    assert not joined("fp8", [replace(one, program=right, low_precision=8)], 12).ok


def test_every_digit_is_held_out_once() -> None:
    images = torch.arange(1797)
    every = Data(images, images)
    held_out = torch.cat([every.images[slice(fold, None, FOLDS)] for fold in range(FOLDS)])
    assert torch.equal(held_out.sort().values, images)
    seen = every.without(slice(3, None, FOLDS))
    assert not torch.isin(seen.images, every.images[3::FOLDS]).any() and torch.equal(seen.images, seen.digits)


def test_a_claim_or_many_codes_are_a_miss() -> None:
    row = Row("resnet18", "fp8", codes=1_000_000, unequal=10)
    assert row.ok
    assert not replace(row, unequal=11).ok and not replace(row, claimed=["conv a (fp8): ran in half"]).ok


@pytest.mark.slow
def test_digits_keep_their_top1() -> None:
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    pytest.importorskip("tensorrt_rtx", reason="the builder: pip install 'qcompile[tensorrt-rtx]'")
    for row in run(tiny=True):
        assert row.low_precision == row.convolutions == 9 and row.unquantized > 80
        assert max(abs(row.program - row.unquantized), abs(row.onnxruntime - row.unquantized)) < 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet-sd", "vae-decoder", "detector"])
def test_files_give_the_codes_of_the_program(name: str) -> None:
    row = measure(name, "fp8", builds=False)
    assert (row.failures, row.unequal) == ([], 0) and row.codes > 1000
    assert row.coverage["convolution"][0] == row.coverage["convolution"][1]
