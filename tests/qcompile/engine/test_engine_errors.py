"""One clear error for each way in which a build cannot work, and the right builder for each target."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from qcompile.engine import build_engine
from qcompile.engine.backend import find_backend, parse_target
from qcompile.errors import EngineError

pytest.importorskip("tensorrt_rtx")


def message(path: Path, target: str = "sm89", **options: Any) -> str:
    with pytest.raises(EngineError) as caught:
        build_engine(path, target=target, progress=False, **options)
    return str(caught.value)


def test_not_an_onnx_file(tmp_path: Path) -> None:
    assert "no ONNX file at" in message(tmp_path / "missing.onnx")
    for content in (b"hello garbage", b""):
        (tmp_path / "garbage.onnx").write_bytes(content)
        assert "garbage.onnx" in message(tmp_path / "garbage.onnx")


def test_parser_errors_name_node_and_module(new_file: Any, tmp_path: Path) -> None:
    file = new_file()
    x = file.op("Relu", file.input("x", [8, 64]))
    file.output(file.op("Frobnicate", x, domain="other", scope="layers.3.mlp"), [8, 64])
    text = message(file.save(tmp_path / "m.onnx"))
    assert "Frobnicate 'node_Frobnicate_1' in module 'layers.3.mlp'" in text
    assert "hint: TensorRT does not know this operator" in text


def test_type_mismatch_is_told_without_cuda_noise(new_file: Any, tmp_path: Path) -> None:
    file = new_file()
    x = file.input("x", [8, 64])
    file.output(file.op("Add", x, file.constant(np.ones(64, np.float32)), scope="layers.0.norm"), [8, 64])
    text = message(file.save(tmp_path / "m.onnx"))
    assert "module 'layers.0.norm'" in text
    assert "types Half and Float" in text
    assert "CUDA driver" not in text


def test_zero_scale(new_file: Any, tmp_path: Path) -> None:
    file = new_file()
    file.output(file.linear(file.qdq(file.input("x", [8, 64]), 0.0), 64, 64, None, "fc"), [8, 64])
    assert "hint: a scale is 0" in message(file.save(tmp_path / "m.onnx"))


def test_fp8_on_an_old_gpu_is_refused_before_the_build(linear_file: Callable[..., Path]) -> None:
    text = message(linear_file("fp8"), "sm86")
    assert "uses FP8 (FLOAT8E4M3FN), and sm86 has no FP8 arithmetic" in text
    assert "recipe int8" in text and "FP8 needs sm89 or newer" in text
    assert build_engine(linear_file("int8"), target="sm86", progress=False).gemms["int8"] == 1


def test_the_builder_refuses_fp8_there_too(linear_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.engine.build.precheck", lambda graph, target: None)
    text = message(linear_file("fp8"), "sm86")
    assert "refused the file for sm86" in text
    assert "hint: FP8 needs sm89 or newer" in text


def test_nvfp4_on_sm89_is_refused_before_the_build(new_file: Any, tmp_path: Path) -> None:
    file = new_file(opset=23)
    x = file.input("x", [8, 64])
    weight = onnx.helper.make_tensor("w", TensorProto.FLOAT4E2M1, [64, 64], bytes(2048), raw=True)
    file.initializers.append(weight)
    scales = file.constant(np.ones((4, 64), np.float16))
    dequantized = file.op("DequantizeLinear", "w", scales, axis=0, block_size=16, scope="layers.0.fc")
    file.output(file.op("MatMul", x, dequantized), [8, 64])
    text = message(file.save(tmp_path / "m.onnx"))
    assert text.startswith("layers.0.fc uses FP4")
    assert "build for sm120" in text
    assert "recipe fp8" in text


def test_block_scaled_weight_with_static_activation_is_refused(new_file: Any, tmp_path: Path) -> None:
    file = new_file()
    x = file.qdq(file.input("x", [128, 256]))
    codes = file.constant(np.ones((256, 64), ml_dtypes.float8_e4m3fn))
    scales, zeros = file.real(np.full((2, 64), 0.01)), file.zero("fp8", (2, 64))
    weight = file.op("DequantizeLinear", codes, scales, zeros, axis=0, block_size=128)
    file.output(file.op("MatMul", x, weight, scope="layers.0.fc"), [128, 64])
    assert message(file.save(tmp_path / "m.onnx")).startswith(
        "layers.0.fc (node node_MatMul_3): an FP8 weight with block scales"
    )


def test_attention_without_a_kernel_names_the_module(attention_file: Callable[..., Path]) -> None:
    text = message(attention_file("operator", length=16, decomposable=False, scope="layers.7.attn"))
    assert "dedicated kernel" in text
    assert "layers.7.attn: its key sequence can be as short as 16" in text


def test_missing_profile_shows_an_example_that_works(attention_file: Callable[..., Path]) -> None:
    path = attention_file(length="tokens", quantized=True)
    text = message(path)
    assert "q: (1, 2, tokens, 32); dynamic: tokens" in text
    example = eval(text.rpartition("profiles=")[2])
    assert build_engine(path, target="sm89", profiles=example, progress=False).attention.fp8 == 1


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ({"y": ((1, 64),) * 3}, "names 'y', but the file's inputs are x, and its dynamic dimensions rows"),
        ({"row": (1, 2, 3)}, "names 'row', but the file's inputs are x, and its dynamic dimensions rows"),
        ({"rows": (3, 2, 1)}, "axis 0 needs min <= opt <= max, not 3, 2, 1"),
        ({}, "x: (rows, 64); dynamic: rows"),
        ({"x": ((1,), (2,), (3,))}, "three shapes (min, opt, max) of 2 sizes"),
        ({"x": ((1, 64), (2, 64))}, "three shapes (min, opt, max) of 2 sizes"),
        ({"x": (1, 2, 3)}, "three shapes (min, opt, max) of 2 sizes"),
        ({"x": (1, 64)}, "three shapes (min, opt, max) of 2 sizes"),
        ({"x": ((1, 32), (2, 32), (3, 32))}, "axis 1 is 64 in the file, not 32, 32, 32"),
        ({"x": ((4, 64), (2, 64), (8, 64))}, "axis 0 needs min <= opt <= max, not 4, 2, 8"),
    ],
)
def test_wrong_profiles(linear_file: Callable[..., Path], profile: Any, expected: str) -> None:
    assert expected in message(linear_file(rows="rows"), profiles=profile)


@pytest.mark.parametrize("profiles", [5, "x", [5], {"x": None}, {"x": 3.5}, {"x": ((1, 64), ("2", 64), (3, 64))}])
def test_what_is_no_profile_is_refused_before_the_file_is_read(tmp_path: Path, profiles: Any) -> None:
    assert "profile" in message(tmp_path / "missing.onnx", profiles=profiles)


def test_external_data(linear_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = linear_file(save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (path.parent / "weights.bin").stat().st_size > 4096
    assert build_engine(path, target="sm89", progress=False).gemms["fp8"] == 1
    monkeypatch.chdir(path.parent)
    assert build_engine("linear.onnx", target="sm89", progress=False).gemms["fp8"] == 1


@pytest.mark.parametrize(("text", "number"), [("sm89", 89), ("SM_120", 120), ("8.9", 89), ("12.0", 120), ("121", 121)])
def test_targets(text: str, number: int) -> None:
    assert parse_target(text) == number
    assert find_backend(text).target == number


def test_unknown_targets() -> None:
    with pytest.raises(EngineError, match="write it like sm89"):
        find_backend("ada")
    with pytest.raises(EngineError, match=r"unknown target sm90: .* builds for sm75, .*sm89, sm120"):
        find_backend("sm90")


def test_no_target_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="no target was given"):
        find_backend(None)


def pretend(monkeypatch: pytest.MonkeyPatch, packages: dict[str, Any], gpu: tuple[int, int] | None) -> None:
    """Installed builder packages and a GPU, as far as choosing between them goes."""

    def import_module(name: str) -> Any:
        if name not in packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return packages[name]

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)


def test_choice_of_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    rtx, full = importlib.import_module("tensorrt_rtx"), SimpleNamespace(__version__="10.0")
    pretend(monkeypatch, {"tensorrt": full, "tensorrt_rtx": rtx}, (8, 9))
    assert find_backend("sm89").package == find_backend(None).package == "tensorrt"
    assert find_backend("sm120").package == "tensorrt_rtx"
    pretend(monkeypatch, {"tensorrt": full, "tensorrt_rtx": rtx}, None)
    assert find_backend("sm89").package == "tensorrt_rtx"
    pretend(monkeypatch, {"tensorrt": full}, (9, 0))
    assert find_backend("sm90").target == 90
    with pytest.raises(EngineError, match=r"this machine's GPU is sm90: to build for sm89 .*qcompile\[tensorrt-rtx\]"):
        find_backend("sm89")
    pretend(monkeypatch, {}, None)
    with pytest.raises(EngineError, match=r"pip install 'qcompile\[tensorrt-rtx\]'"):
        find_backend("sm89")


def test_progress_goes_to_stderr_only(linear_file: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    build_engine(linear_file(), target="sm89", progress=True)
    assert capfd.readouterr().out == ""
