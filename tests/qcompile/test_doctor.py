"""`qcompile doctor` says what importlib, ONNX Runtime and the builder say; what is declared and broken fails it."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

import passes.compat
from passes.private import Private
from qcompile import doctor
from qcompile.cli import main
from qcompile.engine.backend import find_backend

GONE = Private("torch._guards", "nothing", "a test")


@pytest.fixture(autouse=True)
def two_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing every library that has private names takes long; tests/test_compat.py does."""
    monkeypatch.setattr(doctor, "probes", lambda: [Private("torch._guards", "TracingContext", "a test")])


def test_private_names_are_probed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert examined(capsys, 0)["insides"] == [{"library": "torch", "names": 1, "problems": []}]
    monkeypatch.setattr(doctor, "probes", lambda: [*passes.compat.probes(), GONE])
    found = examined(capsys, 1)
    assert found["insides"][0]["names"] > 10 and found["problems"] == [GONE.problem()]
    assert main(["doctor"]) == 1
    assert "1 broken" in capsys.readouterr().out


def examined(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = examined(capsys, 0)
    packages = {package["name"]: package for package in found["packages"]}
    assert packages["torch"]["installed"] == metadata.version("torch")
    assert packages["torch"]["tested"] == "2.13.0" and packages["torch"]["declared"] == ">=2.11"
    assert packages["transformers"]["extra"] == "transformers" and "pytest" not in packages
    assert found["providers"] == onnxruntime.get_available_providers()
    routes = {route["recipe"]: route for route in found["routes"]}
    assert routes["fp8"]["onnxruntime"] and not routes["nvfp4"]["onnxruntime"]
    assert len(found["devices"]) == 1 + torch.cuda.device_count()


def test_engines_are_those_that_the_builder_takes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = examined(capsys, 0)
    builder = next(builder for builder in found["builders"] if builder["name"] == "tensorrt_rtx")
    assert all(find_backend(target, "tensorrt_rtx").capability is not None for target in builder["targets"])
    routes = {route["recipe"]: route["engines"] for route in found["routes"]}
    assert {"sm89", "sm120"} <= set(routes["fp8"]) < set(routes["int8"]) and "sm89" not in routes["nvfp4"]


def test_what_is_declared_and_broken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = ["torch>=99", "nobodys_package>=2", 'numpy>=99; extra == "transformers"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: broken)
    problems = examined(capsys, 1)["problems"]
    assert problems == [
        f"torch: {metadata.version('torch')} is outside of what is declared: pip install 'torch>=99'",
        "nobodys_package: not installed: pip install 'nobodys_package>=2'",
        f"numpy: {metadata.version('numpy')} is outside of what is declared: pip install 'numpy>=99'",
    ]
    assert main(["doctor"]) == 1
    assert all(f"problem: {problem}" in capsys.readouterr().out for problem in problems[:1])


def test_what_an_extra_would_bring_may_be_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda _: ['nobodys_package>=2; extra == "more"', 'x; extra == "dev"']
    )
    assert main(["doctor"]) == 0
    assert "pip install 'qcompile[more]'" in capsys.readouterr().out


def test_a_builder_that_cannot_be_imported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1", __spec__=SimpleNamespace()))
    (found,) = examined(capsys, 1)["problems"]
    assert found.startswith("tensorrt_rtx: cannot be imported: AttributeError")
