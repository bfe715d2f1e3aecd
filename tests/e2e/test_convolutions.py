"""Convolutions through quantize, ONNX and the builder: each case in the form that its layer list was seen to have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qcompile
from qcompile.cli import main
from qcompile.report.program import ProgramReport

C = 64
DYNAMIC = torch.export.Dim.DYNAMIC
CODES = {"fp8": onnx.TensorProto.FLOAT8E4M3FN, "int8": onnx.TensorProto.INT8}
PER_CHANNEL = {"format": "fp8", "granularity": "per_channel"}
PER_TOKEN = {"format": "fp8", "granularity": "per_token", "dynamic": True}


def recipe(fmt: str, granularity: str = "per_tensor", *, algorithm: str = "max") -> dict[str, Any]:
    return {
        "metadata": {"name": "test", "description": "all convolutions"},
        "calibration": {"algorithm": algorithm, "power_of_two": True},
        "rules": [
            {"quantizer": "*.weight_quantizer", "format": fmt, "granularity": granularity},
            {"quantizer": "*.input_quantizer", "format": fmt},
        ],
    }


def image(*sizes: int) -> torch.Tensor:
    return torch.randn(1, *sizes, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Any, torch.Tensor]] = {
    "1x1": (lambda: nn.Conv2d(C, C, 1), image(C, 16, 16)),
    "3x3": (lambda: nn.Conv2d(C, C, 3, padding=1), image(C, 16, 16)),
    "strided": (lambda: nn.Conv2d(C, C, 5, stride=2), image(C, 16, 16)),
    "dilated": (lambda: nn.Conv2d(C, C, 3, dilation=2), image(C, 16, 16)),
    "grouped": (lambda: nn.Conv2d(C, C, 3, groups=4), image(C, 16, 16)),
    "depthwise": (lambda: nn.Conv2d(C, C, 3, groups=C), image(C, 16, 16)),
    "depthwise 5x5": (lambda: nn.Conv2d(C, C, 5, groups=C), image(C, 16, 16)),
    "depthwise 7x7": (lambda: nn.Conv2d(C, C, 7, groups=C, padding=3), image(C, 16, 16)),
    "depthwise 9x9": (lambda: nn.Conv2d(C, C, 9, groups=C, padding=4), image(C, 16, 16)),
    "same": (lambda: nn.Conv2d(C, C, 4, padding="same"), image(C, 16, 16)),
    "reflect": (lambda: nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"), image(C, 16, 16)),
    "1-D": (lambda: nn.Conv1d(C, C, 32), image(C, 64)),
    "1-D wide": (lambda: nn.Conv1d(C, C, 33), image(C, 64)),
    "1-D depthwise": (lambda: nn.Conv1d(C, C, 31, groups=C, padding=15), image(C, 64)),
    "3-D": (lambda: nn.Conv3d(C, C, 3, padding=1), image(C, 4, 8, 8)),
    "colors": (lambda: nn.Conv2d(3, C, 3), image(3, 16, 16)),
    "stem": (lambda: nn.Conv2d(3, C, 7, stride=2, padding=3), image(3, 32, 32)),
}
WIDE = {"1-D wide", "stem", "depthwise 9x9"}  # more than 32 elements in the kernel
FEW = ("3x3", "depthwise 7x7", "stem")


def quantized(name: str, fmt: str, granularity: str, **options: Any) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    make, x = CASES[name]
    model = nn.Sequential(make(), nn.ReLU(), nn.Conv1d(C, 8, 1) if x.ndim == 3 else nn.Identity()).eval()
    return qcompile.quantize(
        model, (x,), recipe=recipe(fmt, granularity), calibration=[x], progress=False, **options
    ), x


def forms(fmt: str, granularity: str) -> list[Any]:
    marks = [pytest.param(fmt, granularity, name, marks=() if name in FEW else pytest.mark.slow) for name in CASES]
    return [param for param in marks if granularity == "per_tensor" or param.values[2] in ("3x3", "grouped", "3-D")]


@pytest.mark.parametrize("target", ["sm89", pytest.param("sm120", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fmt", "granularity", "name"),
    [
        *forms("fp8", "per_tensor"),
        *forms("fp8", "per_channel"),
        *forms("int8", "per_tensor"),
        *forms("int8", "per_channel"),
    ],
)
def test_the_builder_runs_what_the_table_says(fmt: str, granularity: str, name: str, target: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    program, _ = quantized(name, fmt, granularity)
    report = ProgramReport.of(program)
    if fmt == "fp8" and name in WIDE:
        assert report.unquantized == {"0": "convolution"} | report.unquantized
        assert "at most 32 elements" in report.reasons["0"] and report.reasons["0"].endswith("give it INT8")
    else:
        assert report.quantized["0"] == fmt
    engine = qcompile.build_engine(program, None, target=target, progress=False)
    half = fmt == "fp8" and (name in WIDE or (name == "depthwise 7x7" and target == "sm89"))
    assert engine.precisions["0"] == ("half" if half else fmt)
    if half and name not in WIDE:  # which a file for SM120 keeps, and a build for SM89 tells
        assert any("but for this one on sm120 or newer" in gap.reason for gap in engine.not_low_precision)
    if not half:
        engine.check({f"convolution_{fmt}": 1})


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
@pytest.mark.parametrize(
    ("fmt", "granularity", "algorithm"),
    [
        ("fp8", "per_tensor", "max"),
        ("int8", "per_channel", "max"),
        pytest.param("fp8", "per_channel", "mse", marks=pytest.mark.slow),
        pytest.param("int8", "per_tensor", "mse", marks=pytest.mark.slow),
        pytest.param("int8", "per_channel", "mse", marks=pytest.mark.slow),
    ],
)
def test_onnx_runtime_gives_the_codes_of_the_program(
    fmt: str, granularity: str, algorithm: str, target: Any, tmp_path: Path
) -> None:
    """In float32 with scales that are powers of two, products are exact, and what the last layer rounds is equal."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, groups=32, stride=2), nn.Conv2d(32, 16, 3, groups=4, dilation=2), nn.Conv2d(16, 8, 1)),
    ).eval()
    x = torch.cat([image(16, 20, 20), image(16, 20, 20).flip(3)])
    rules = recipe(fmt, granularity, algorithm=algorithm)
    program = qcompile.quantize(
        model, (x,), recipe=rules, calibration=[x], dtype=torch.float32, dynamic_shapes=({0: DYNAMIC},), progress=False
    )
    expected = program.module()(x).numpy()
    assert np.linalg.norm(expected - model(x).detach().numpy()) / np.linalg.norm(expected) < 0.15
    for opset in (19, 21, 23):
        report = qcompile.export_onnx(program, tmp_path / "model.onnx", target=target, opset=opset)
        assert report.passed and report.coverage == {"convolution": (4, 4)}
        session = qcompile.onnx_session(tmp_path / "model.onnx")
        for batch in (x, x[:1]):
            found = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
            np.testing.assert_allclose(found, program.module()(batch).numpy(), rtol=0, atol=2e-6)
    file = onnx.load(tmp_path / "model.onnx")
    weights = {i.name: i for i in file.graph.initializer if len(i.dims) == 4}
    assert len(weights) == 4 and all(i.data_type == CODES[fmt] for i in weights.values())
    axes = {
        a.i for n in file.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights for a in n.attribute
    }
    assert granularity == "per_tensor" or axes == {0}


def test_scales_of_blocks_and_tokens_are_none_for_a_convolution() -> None:
    """Globs of users' recipes reach convolutions, too: what nothing convolves is listed, with the rule."""
    model, x = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 32)).eval(), image(32, 6, 6)
    for weight, given in (({"format": "nvfp4"}, {"format": "nvfp4"}), (PER_CHANNEL, PER_TOKEN)):
        rules: Any = {
            "metadata": {"name": "test", "description": "blocks"},
            "rules": [{"quantizer": "*.weight_quantizer"} | weight, {"quantizer": "*.input_quantizer"} | given],
        }
        program = qcompile.quantize(model, (x,), recipe=rules, calibration=[x], progress=False)
        report = ProgramReport.of(program)
        assert report.coverage == {"linear": (1, 1), "convolution": (0, 1)}
        assert "no target convolves" in report.reasons["0"] and "(rules[" in report.reasons["0"]


def test_reports_say_what_each_convolution_gains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(8, 256, 1), nn.Conv2d(256, 256, 3), nn.ConvTranspose2d(256, 4, 2)),
        image(8, 6, 6),
    )
    rules = recipe("fp8") | {"convolutions": "where_it_pays"}
    program = qcompile.quantize(model.eval(), (x,), recipe=rules, calibration=[x], progress=False)
    report = qcompile.export_onnx(program, tmp_path / "model.onnx")
    narrow, wide = report.convolutions
    assert (narrow.module, narrow.format, wide.module, wide.format) == ("0", "", "1", "fp8")
    assert narrow.operations == 2 * 36 * 8 * 256 and narrow.bytes == 2 * (8 * 36 + 8 * 256 + 256 * 36)
    assert narrow.intensity == narrow.operations / narrow.bytes
    assert narrow.bytes_on_codes == 8 * 36 * 4 + 8 * 256 + 256 * 36 * 2
    assert narrow.gain < 1.1 < wide.gain and wide.gain_per_channel < wide.gain
    assert f"{narrow.gain:.2f} times" in report.reasons["0"]
    assert ProgramReport.of(program).convolutions == report.convolutions
    (tmp_path / "report.json").write_text(report.to_json())
    older = {name: value for name, value in report.data().items() if name != "convolutions"}
    assert qcompile.Report.from_data(older).convolutions == []
    assert main(["inspect", str(tmp_path / "report.json")]) == 0
    assert "Convolutions, by the roofline (2)" in (shown := capsys.readouterr().out) and f"{wide.gain:.2f} x" in shown


def test_a_recipe_says_which_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3)).eval()
    x = image(8, 28, 28)
    listed = {}
    for which in ("all", "where_it_pays", "none"):
        rules = recipe("fp8") | {"convolutions": which}
        rules["rules"] = [*rules["rules"], {"quantizer": "*.output_quantizer", "format": "fp8"}]
        if which == "none":  # of a model that has something else
            model.append(nn.Flatten()).append(nn.Linear(256 * 24 * 24, 8))
        report = ProgramReport.of(qcompile.quantize(model, (x,), recipe=rules, calibration=[x], progress=False))
        listed[which] = report.coverage["convolution"]
        if which != "all":
            assert report.unquantized["0"] == "convolution" and which in report.reasons["0"] + "where_it_pays"
        if which == "where_it_pays":
            assert "times as fast as in half precision" in report.reasons["0"]
    assert listed == {"all": (2, 2), "where_it_pays": (1, 2), "none": (0, 2)}


class Block(nn.Module):
    """ResNet's: two convolutions beside a skip branch, with a convolution in that where sizes change."""

    def __init__(self, stride: int, channels: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, stride, 1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.skip(x)
        return torch.relu(skip + self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_skip_branch_is_quantized_where_the_sum_is_not_written_twice(granularity: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stem, pool = nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(2)
    model = nn.Sequential(stem, nn.ReLU(), pool, Block(1), Block(1), Block(2), Block(1), nn.AvgPool2d(2)).eval()
    x = image(3, 32, 32)
    rules = recipe("int8", granularity)
    program = qcompile.quantize(model, (x,), recipe=rules, calibration=[x], dtype=torch.float32, progress=False)
    without = ProgramReport.of(program)
    rules["rules"].append({"quantizer": "*.residual_quantizer", "format": "int8"})
    given: dict[str, Any] = {"recipe": rules, "calibration": [x], "progress": False}
    program = qcompile.quantize(model, (x,), dtype=torch.float32, **given)
    report = ProgramReport.of(program)
    found = report.quantized.items() - without.quantized.items()
    assert found == ({("3", "int8"), ("4", "int8"), ("6", "int8")} if granularity == "per_channel" else set())
    reasons = {d.module: d.reason for d in report.declined}
    assert "no convolution reads it on codes" in reasons["5"] if found else "a scale for each channel" in reasons["4"]
    written = qcompile.export_onnx(program, tmp_path / "model.onnx", target="portable")
    assert written.passed and written.quantized == report.quantized
    session = qcompile.onnx_session(tmp_path / "model.onnx")
    given_by_others = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(given_by_others, program.module()(x).numpy(), rtol=0, atol=2e-6)
    expected = model(x).detach().numpy()
    assert np.linalg.norm(given_by_others - expected) / np.linalg.norm(expected) < 0.05


@pytest.mark.slow
def test_the_builder_has_fewer_kernels_with_the_skip_branch() -> None:
    pytest.importorskip("tensorrt_rtx")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Block(1), Block(1)).eval()
    x, kernels = image(3, 32, 32), []
    for more in ([], [{"quantizer": "*.residual_quantizer", "format": "int8"}]):
        rules = recipe("int8", "per_channel")
        rules["rules"] = [*rules["rules"], *more]
        program = qcompile.quantize(model, (x,), recipe=rules, calibration=[x], progress=False)
        kernels.append(qcompile.build_engine(program, None, target="sm89", progress=False).kernels)
    assert kernels[1] < kernels[0]


@pytest.mark.slow
def test_engines_say_how_many_kernels_a_convolution_has() -> None:
    """By the layer list: one scale for the weight is a kernel for the input's codes, one for each channel two."""
    pytest.importorskip("tensorrt_rtx")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(C, C, 3), nn.ReLU(), nn.Conv2d(C, C, 3)).eval(), image(C, 16, 16)
    for granularity, kernels in (("per_tensor", 2), ("per_channel", 3)):
        rules = recipe("int8", granularity)
        program = qcompile.quantize(model, (x,), recipe=rules, calibration=[x], progress=False)
        engine = qcompile.build_engine(program, None, target="sm89", progress=False)
        assert engine.convolution_kernels == {"0": kernels, "2": kernels}


@pytest.mark.slow
@pytest.mark.parametrize(
    "between", [nn.GroupNorm(8, C), nn.SiLU(), nn.GELU(), nn.Sequential(nn.GroupNorm(8, C), nn.SiLU())]
)
def test_codes_are_made_in_the_kernel_of_what_a_convolution_reads(between: nn.Module) -> None:
    """The quantizer of the next input is enough: an output quantizer would save nothing."""
    pytest.importorskip("tensorrt_rtx")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(C, C, 3), between, nn.Conv2d(C, C, 3)).eval(), image(C, 16, 16)
    program = qcompile.quantize(model, (x,), recipe=recipe("fp8"), calibration=[x], progress=False)
    engine = qcompile.build_engine(program, None, target="sm89", progress=False)
    assert engine.kernels == 5  # the input, two convolutions, what is between them, the output
