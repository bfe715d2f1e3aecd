"""`convolutions: where_it_pays`, the default of shipped recipes: one kernel more at most for each that is quantized."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

import qcompile
from benchmarks import paying
from qcompile.report.program import ProgramReport

C = 256  # at which a 3x3 convolution pays


class Block(nn.Module):
    """Two convolutions beside a third, that of the skip branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
        self.skip = nn.Conv2d(C, C, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.skip(x)).mean((2, 3))


def quantized(middle: nn.Module, recipe: str, *overrides: str) -> ExportedProgram:
    torch.manual_seed(0)
    x = torch.randn(1, 8, 14, 14)
    model = nn.Sequential(nn.Conv2d(8, C, 1), nn.ReLU(), middle).eval()
    chosen = qcompile.load_recipe(recipe, overrides)
    return qcompile.quantize(model, (x,), recipe=chosen, calibration=[x], progress=False)


def kernels(program: ExportedProgram) -> int:
    return qcompile.build_engine(program, None, target="sm89", progress=False).kernels


def test_the_skip_branch_joins_where_that_saves_a_kernel() -> None:
    pytest.importorskip("tensorrt_rtx")
    report = ProgramReport.of(program := quantized(Block(), "int8"))
    gains = {one.module: one.gain_per_channel for one in report.convolutions}
    assert set(report.quantized) >= {"2.first", "2.second", "2.skip"} and gains["2.skip"] < 1 < gains["2.first"]
    assert report.coverage["convolution"] == (3, 4)
    assert kernels(program) <= kernels(quantized(Block(), "int8", "convolutions=none")) + 3


def test_a_lone_convolution_with_two_kernels_more_is_left_with_the_reason() -> None:
    """With a scale for each channel it has one before it and one behind; with one scale the first alone."""
    lone = nn.Sequential(nn.Conv2d(C, C, 3), nn.ReLU(), nn.Conv2d(C, 8, 1))
    report = ProgramReport.of(quantized(lone, "int8"))
    assert report.coverage["convolution"] == (0, 3)
    assert "2.0" not in report.quantized and "it adds 2 kernels, before and behind" in report.reasons["2.0"]
    report = ProgramReport.of(quantized(lone, "fp8"))
    assert report.quantized == {"2.0": "fp8"} and "operations for each byte" in report.reasons["2.2"]
    assert "`convolutions: all` has it quantized" in report.reasons["0"]


def test_a_model_of_which_no_convolution_pays_says_so(caplog: pytest.LogCaptureFixture) -> None:
    x, model = torch.randn(1, 3, 8, 8), nn.Conv2d(3, 8, 3)
    more = nn.Sequential(model, nn.Flatten(), nn.Linear(8 * 36, 8))
    for subject, said in ((model, "nothing of this model is quantized"), (more, "the convolution is not quantized")):
        for recipe in ("fp8", "int8"):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "qcompile"):
                qcompile.quantize(subject.eval(), (x,), recipe=recipe, calibration=[x], progress=False)
            assert (
                said in caplog.text and "11.2 operations for each byte" in caplog.text and "convolutions" in caplog.text
            )
    assert "--set convolutions=all" in caplog.text
    caplog.clear()
    every = qcompile.load_recipe("fp8", ["convolutions=all"])
    program = qcompile.quantize(more, (x,), recipe=every, calibration=[x], progress=False)
    assert ProgramReport.of(program).coverage["convolution"] == (1, 1) and "pay" not in caplog.text


@pytest.mark.parametrize(
    "name", ["fp8", "fp8_qkvo-nvfp4_mlp", "int8", "int8_attention", "nvfp4", "nvfp4_fp8_attention"]
)
def test_it_is_the_default_of_recipes_that_quantize_convolutions(name: str) -> None:
    assert qcompile.load_recipe(name).convolutions == "where_it_pays"
    assert qcompile.load_recipe(name, ["convolutions=all"]).convolutions == "all"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", paying.RECIPES)
@pytest.mark.parametrize("name", paying.MODELS)
def test_each_convolution_adds_one_kernel_at_most(name: str, recipe: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    rows = list(paying.measure(name, recipe))
    assert [row.target for row in rows] == list(paying.TARGETS) and all(row.ok for row in rows), rows
