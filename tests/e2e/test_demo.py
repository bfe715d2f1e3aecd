"""The demo: from training to two engines. The whole of it is slow; a few epochs of it run every day."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
import torch

from qcompile.cli.demo_route import run_demo
from qcompile.demo.measure import accuracy
from qcompile.demo.model import load_digits

pytest.importorskip("sklearn")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx")

FILES = {"vit-fp16.onnx", "vit-fp8.onnx", "vit-nvfp4.onnx"}
ENGINES = {f"vit-{kind}.{target}.engine" for kind in ("fp16", "fp8") for target in ("sm89", "sm120")}
ENGINES |= {"vit-nvfp4.sm120.engine"}


def check_files(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES | ENGINES
    onnx.checker.check_model(onnx.load(folder / "vit-fp8.onnx"), full_check=True)


def file_accuracy(path: Path) -> float:
    """Top-1 of the file on the held-out images, by ONNX Runtime alone."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, sess_options=options, providers=["CPUExecutionProvider"])
    digits = load_digits()
    (logits,) = session.run(None, {session.get_inputs()[0].name: digits.test_images.numpy()})
    return float((torch.from_numpy(logits).argmax(-1) == digits.test_labels).double().mean())


@pytest.mark.slow
def test_a_short_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly trained, the logits are close together: what is held to here is the route, not the accuracy."""
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table breaks its cells
    code = run_demo(epochs=2, output=tmp_path)
    captured = capsys.readouterr()
    check_files(tmp_path)
    assert "3 of 3" in captured.out and "not fused" not in captured.err
    assert code in (0, 1) and (code == 1) == ("falls short" in captured.err)


@pytest.mark.slow
def test_without_a_builder_the_rest_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, package, None)
    run_demo(epochs=1, output=tmp_path)
    captured = capsys.readouterr()
    assert "no engines for sm89: building an engine needs TensorRT" in captured.err
    assert "FP8 ONNX" in captured.out and "attn" not in captured.out
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.slow
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table breaks its cells
    assert run_demo(output=tmp_path) == 0
    check_files(tmp_path)
    assert file_accuracy(tmp_path / "vit-fp8.onnx") >= 0.965
    assert capsys.readouterr().out.count("3 of 3") == 3


def test_accuracy_by_hand() -> None:
    reference = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    flipped = reference.flip(1)
    measured = accuracy(flipped, torch.tensor([0, 0]), reference)
    assert measured.top1 == 0.5
    assert measured.error == pytest.approx(2**0.5)
    p = torch.softmax(reference[0].double(), -1)
    assert measured.kl == pytest.approx(float(2 * (p[0] - p[1])))  # the log-ratios of both classes are +-2
    assert accuracy(reference, torch.tensor([0, 1]), reference).kl == 0
