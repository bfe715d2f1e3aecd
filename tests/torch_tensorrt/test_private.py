"""Private names of Torch-TensorRT, which `qcompile doctor` probes where there is a GPU."""

from __future__ import annotations

from qcompile.compat.torch_tensorrt import NAMES


def test_private_names_are_there() -> None:
    assert [problem for private in NAMES if (problem := private.problem())] == []
