"""What can be known at the start is said at the start: the source is never opened, and the model never worked on."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile import outputs
from qcompile.ahead import check_model_target
from qcompile.cli import main
from qcompile.engine.backend import find_backend
from qcompile.engine.capability import lacking
from qcompile.errors import EngineError, QCompileError
from qcompile.recipe import load_recipe
from qcompile.recipe.asked import asked_formats, calibrates
from qcompile.sizes import least_bytes, program_bytes

MODELS = """
from pathlib import Path
import torch
def never():
    Path("opened").touch()
    raise AssertionError("the source was opened")
def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)), (torch.ones(2, 64),)
def data():
    return [torch.ones(2, 64)]
"""
DATA = ("--calibration", "fakes:data")
NEVER = ("export", "fakes:never", "-o", "m.onnx", "--recipe", "fp8", *DATA)
NVFP4 = ("export", "fakes:never", "-o", "m.onnx", "--recipe", "nvfp4", *DATA)
MIXED = ("export", "fakes:never", "-o", "m.onnx", "--recipe", "fp8_qkvo-nvfp4_mlp", *DATA)
INT8 = ("export", "fakes:never", "-o", "m.onnx", "--recipe", "int8", *DATA)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fakes.py").write_text(MODELS)
    (tmp_path / "a_directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fakes", raising=False)
    return tmp_path


def refused(here: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    before = sorted(here.iterdir())
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and told.count("error: ") == 1
    assert [p for p in sorted(here.iterdir()) if p.name != "__pycache__"] == before, "nothing was opened or written"
    return told


@pytest.mark.parametrize(
    ("argv", "messages"),
    [
        (
            (*NVFP4, "--target", "sm89"),
            ("yaml:6: the recipe nvfp4 asks for", "sm89 has no FP4", "the recipe fp8"),
        ),
        ((*NVFP4, "--engine", "e", "--target", "8.9"), ("asks for nvfp4",)),
        ((*MIXED, "--target", "sm89"), ("asks for nvfp4", "sm89 has no FP4")),
        ((*MIXED, "--target", "sm86"), ("asks for nvfp4", "asks for fp8", "the recipe int8")),
        ((*NEVER, "--target", "sm86"), ("asks for fp8", "sm86 has no FP8", "the recipe int8")),
        ((*INT8, "--target", "sm75", "--dtype", "bfloat16"), ("sm75 has no bfloat16", "compute in float16")),
        ((*NEVER, "--target", "sm1"), ("sm1",)),
        ((*NEVER, "--target", "sm90"), ("unknown target sm90",)),
        ((*NEVER, "--expect", "kernels=9"), ("no target was given", "--target sm89")),
        ((*NEVER, "--engine", "e"), ("no target was given", "--target sm89")),
        ((*NEVER, "--target", "portable"), ("not a compute capability", "--onnx-target portable")),
        ((*NEVER, "--target", "sm89", "--expect", "speed=3"), ("unknown key 'speed'",)),
        ((*NEVER, "--target", "sm89", "--profile", "x=1,2"), ("write it as dimension=min,opt,max",)),
        ((*NEVER, "--profile", "x=1,2,3"), ("--profile is for an engine",)),
        ((*NEVER, "--opset", "18"), ("FP8 needs 19 or later",)),
        ((*NEVER, "--opset", "24"), ("torch.onnx writes up to 23",)),
        ((*NVFP4, "--opset", "21"), ("--opset 21 has no FP4",)),
        ((*NEVER, "--dtype", "float64"), ("float64",)),
        ((*NEVER, "--set", "rules[99].format=fp8"), ("rules[99]",)),
        ((*NEVER, "--block-fp8", "per_channel"), ("the recipe fp8 asks for none",)),
        ((*NEVER[:-1], "none.npz"), ("there is no calibration file none.npz",)),
        ((*NEVER[:-1], "fakes:none"), ("fakes has no none",)),
        ((*NEVER[:-1], "none.csv"), ("is not there: give a folder of images",)),
        ((*NEVER, "--dynamic", "x"), ("write it as input:axis=dimension",)),
        ((*NEVER[:3], "missing/m.onnx"), ("there is no directory",)),
        ((*NEVER[:3], "a_directory"), ("it is a directory",)),
        ((*NEVER[:3], "pipe"), ("no regular file",)),
        ((*NEVER, "--report", "/dev/stdout"), ("no regular file",)),
        ((*NEVER[:3], "x" * 260), ("File name too long",)),
        ((*NEVER, "--report", "fakes.py/r.json"), ("there is no directory",)),
        ((*NEVER, "--engine", "missing/e", "--target", "sm89"), ("there is no directory",)),
        ((*NEVER, "--save-program", "a_directory"), ("it is a directory",)),
        (("build", "none.onnx", "-o", "missing/e", "--target", "sm89"), ("there is no directory",)),
        (("build", "none.onnx", "--target", "sm89"), ("none.onnx",)),
        (("repair", "none.onnx", "missing/new.onnx"), ("there is no directory",)),
        (("demo", "--output", "missing"), ("there is no directory",)),
        (("checkpoint", "a_directory", "-o", "new", "--calibration", "none.npz"), ("no calibration file",)),
        (("demo", "--epochs", "0"), ("1 or more",)),
        ((*NEVER, "--batch", "0"), ("--batch 0: a size is 1 or more",)),
        ((*NEVER[:-2], "--samples", "3"), ("--samples is for calibration data",)),
        ((*NEVER, "--samples", "0"), ("--samples 0: a size is 1 or more",)),
        ((*NEVER, "--input", "x=2:int64", "--sequence", "8"), ("--sequence: not with --input",)),
        ((*NEVER, "--input", "x"), ("write it as name=shape:dtype",)),
        ((*NEVER, "--sequence", "-1"), ("--sequence -1: a size is 1 or more",)),
    ],
)
def test_refused_at_the_start(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple[str, ...],
    messages: tuple[str, ...],
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = refused(here, capsys, *argv)
    assert all(message in told for message in messages), told
    assert "the source was opened" not in told


def test_what_is_not_known_is_not_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --recipe a factory may return a model that is quantized already."""
    assert main([*NEVER[:4], "--target", "sm86"]) == 2
    assert (here / "opened").exists() and "the source was opened" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "argv", "message"),
    [
        ("onnxruntime", NEVER, "--no-compare"),
        ("transformers", ("export", "a_directory", "-o", "m.onnx"), r"qcompile[transformers]"),
        ("PIL", ("export", "a_directory", "-o", "m.onnx", "--calibration", "a_directory"), r"qcompile[images]"),
        ("onnxruntime", ("demo",), r"qcompile[onnxruntime]"),
        ("tensorrt_rtx", (*NEVER, "--target", "sm89"), r"qcompile[tensorrt-rtx]"),
    ],
)
def test_missing_packages(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    argv: tuple[str, ...],
    message: str,
) -> None:
    (here / "a_directory" / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    assert message in refused(here, capsys, *argv)


def test_a_directory_without_calibration_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a_directory" / "config.json").write_text("{}")
    told = refused(here, capsys, "export", "a_directory", "-o", "m.onnx")
    assert "the recipe fp8 needs calibration data" in told and "a_directory -o m.onnx --calibration random" in told


def test_a_quantized_directory(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "fp8"}}
    (here / "a_directory" / "config.json").write_text(json.dumps(content))
    told = refused(here, capsys, "export", "a_directory", "-o", "m.onnx", "--recipe", "int8")
    assert "is quantized already: leave out --recipe" in told


Usage = namedtuple("Usage", "total used free")


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - free, free))


def test_a_disk_without_room(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrices of 64 x 64 in FP8, two biases of 64 in half: 8,448 bytes a file."""
    monkeypatch.setattr(qcompile, "quantize", None)  # calling it would be an error of another kind
    full(monkeypatch, 8447)
    argv = ("export", "fakes:small", "-o", "m.onnx", "--recipe", "fp8", *DATA)
    told = refused(here, capsys, *argv)
    assert "8,448 bytes are needed, and 8,447 are free" in told and "m.onnx" in told
    full(monkeypatch, 8448)
    told = refused(here, capsys, *argv, "--save-program", "m.pt2")
    assert "16,896 bytes are needed" in told and "m.pt2" in told


def test_a_disk_without_room_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = qcompile.quantize(torch.nn.Linear(64, 64), (torch.ones(2, 64),), calibration=[torch.ones(2, 64)])
    needed = program_bytes(program)
    assert 4096 + 128 <= needed <= 4096 + 128 + 64
    qcompile.export_onnx(program, tmp_path / "m.onnx")
    assert needed <= (tmp_path / "m.onnx").stat().st_size
    full(monkeypatch, needed - 1)
    with pytest.raises(QCompileError, match=f"about {needed:,} bytes are needed"):
        qcompile.export_onnx(program, tmp_path / "new" / "m.onnx")
    with pytest.raises(EngineError, match="bytes are needed"):
        qcompile.build_engine(program, tmp_path / "m.engine", target="sm89", progress=False)
    full(monkeypatch, 1000)
    with pytest.raises(EngineError, match="bytes are needed"):
        qcompile.build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", target="sm89", progress=False)
    assert os.listdir(tmp_path) == ["m.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8", "int8", "nvfp4", "nvfp4_weight_only", "fp8_block"])
def test_the_estimate_is_no_more_than_the_file(tmp_path: Path, recipe: str) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)).half()
    ids = torch.ones(2, 8, dtype=torch.int64)
    program = qcompile.quantize(model, (ids,), recipe=recipe, calibration=[ids], progress=False)
    size = qcompile.export_onnx(program, tmp_path / "m.onnx").bytes
    assert 0.4 * size < least_bytes(model, load_recipe(recipe), None) <= size


class Never(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model was run or captured")


def test_python_functions_check_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    example: Any = (torch.ones(2, 64),)
    for wrong in ({"recipe": "fp88"}, {"dtype": torch.float64}):
        with pytest.raises(QCompileError, match=r"fp88|float64"):
            qcompile.quantize(Never(), example, **wrong)
    with pytest.raises(QCompileError, match="fp88"):
        qcompile.calibrate(Never(), example, recipe="fp88", calibration=[])
    with pytest.raises(QCompileError, match="float64"):
        qcompile.import_quantized(Never(), example, dtype=torch.float64)
    linear = torch.nn.Linear(64, 64)
    program = qcompile.quantize(linear, example, recipe="nvfp4", calibration=[example], progress=False)
    monkeypatch.setattr("qcompile.api.export_onnx", None)
    monkeypatch.setattr("qcompile.onnx.export.run_pipeline", None)
    wrong_builds: list[tuple[dict[str, Any], str]] = [
        ({"target": "sm89"}, "quantized to nvfp4, and sm89 has no FP4"),
        ({"target": "sm90"}, "unknown target"),
        ({"target": "sm120", "expect": {"speed": 1}}, "unknown key"),
        ({"target": "sm120", "output": tmp_path}, "is a directory"),
        ({"target": "sm120", "output": tmp_path / "none" / "e"}, "there is no directory"),
    ]
    for options, message in wrong_builds:
        with pytest.raises(EngineError, match=message):
            qcompile.build_engine(program, **options)
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "file" / "m.onnx", "there is no directory")):
        with pytest.raises(QCompileError, match=message):
            qcompile.export_onnx(program, path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(QCompileError, match=r"qcompile\[onnxruntime\]"):
        qcompile.export_onnx(program, tmp_path / "m.onnx", compare=example)


def test_a_folder_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    outputs.check_writable(tmp_path / "m.onnx", None)
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(QCompileError, match=r"cannot write .*m.onnx: Read-only file system"):
        outputs.check_writable(tmp_path / "m.onnx")


def test_rules_that_ask_and_rules_that_are_overridden() -> None:
    both = load_recipe("fp8_qkvo-nvfp4_mlp")
    assert set(asked_formats(both)) == {"fp8", "nvfp4"}
    overridden = load_recipe("nvfp4", ['rules[+]={quantizer: "*", format: int8}'])
    assert set(asked_formats(overridden)) == {"int8"}
    off = load_recipe("nvfp4", ['rules[+]={quantizer: "*", enable: false}'])
    assert not asked_formats(off)
    assert {name for name in qcompile.list_recipes() if calibrates(load_recipe(name))} == {
        *("fp8", "fp8_gemm", "int8", "int8_attention", "int8_fast", "nvfp4", "nvfp4_fast", "nvfp4_fp8_attention"),
        *("nvfp4_low_rank", "fp8_qkvo-nvfp4_mlp"),
    }


def test_capabilities_are_those_of_the_builder() -> None:
    pytest.importorskip("tensorrt_rtx")
    for target in ("sm75", "sm86", "sm89", "sm120"):
        number = find_backend(target).target
        assert (lacking("nvfp4", number) is None) == (number >= 100)
        assert (lacking("fp8", number) is None) == (number >= 89)
        assert lacking("int8", number) is None and lacking("float16", number) is None
    linear, example = torch.nn.Linear(64, 64), (torch.ones(2, 64),)
    program = qcompile.quantize(linear, example, calibration=[example], progress=False)
    check_model_target(program, 89)
    with pytest.raises(EngineError, match="is quantized to fp8, and sm86 has no FP8"):
        check_model_target(program, 86)
