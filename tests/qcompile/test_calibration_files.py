"""Calibration data that cannot be used: one sentence that names the file and the input, whatever is wrong with it."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcompile
from qcompile.errors import CalibrationError
from qcompile.source import Source, open_calibration

X = torch.randn(4, 8)
SOURCE = Source(torch.nn.Linear(8, 8).eval(), (torch.randn(2, 8),), name="a model")


def circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def packed(size: int) -> bytes:
    """An archive of `.npy` whose zeros are packed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("input.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (size, 8)})
        for _ in range(size // 125_000):
            member.write(bytes(10**6))
    return buffer.getvalue()


def torch_file(data: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(data, path)


def numpy_file(data: Any) -> Callable[[Path], object]:
    return lambda path: np.save(path, np.asarray(data), allow_pickle=True)


def raw(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("a.pt", torch_file({0: X}), r"holds 0, and has to hold tensors by the names of inputs"),
        ("a.pt", torch_file({0: X, "input": X}), r"holds 0, and has to hold tensors"),
        ("a.pt", torch_file({"input": X.to_sparse()}), r"'input' is a tensor of the kind sparse_coo; give a plain one"),
        ("a.pt", torch_file({"input": X.to_sparse_csr()}), r"'input' is a tensor of the kind sparse_csr"),
        ("a.pt", torch_file({"input": X.to("meta")}), r"'input' is on the meta device and has no values"),
        ("a.pt", torch_file(torch.zeros(1).expand(10**9, 8)), r"and holds 4 bytes, repeated"),
        ("a.pt", torch_file({"input": X.to(torch.complex64)}), r"input is torch\.complex64, but the model takes"),
        ("a.pt", torch_file({"input": {"input": X}}), r"input is dict, but the model takes \[2, 8\]"),
        ("a.pt", torch_file({"input": None}), r"input is NoneType, but the model takes"),
        ("a.pt", torch_file({"n" * 10**5: X}), r"lacks input and holds n+\.\.\.n+, which the model does not take"),
        ("a.pt", torch_file(circle()), r"cannot be read as tensors: RecursionError"),
        ("a.pt", torch_file(3), r"holds a int; a tensor, a dict of tensors or a list is wanted"),
        ("a.pt", raw(b""), r"cannot be read as tensors: EOFError"),
        ("a.pt", raw(b"PK\3\4" + bytes(100)), r"cannot be read as tensors: "),
        ("a.npy", numpy_file([object()]), r"cannot be read as tensors: ValueError: Object arrays cannot be loaded"),
        ("a.npy", numpy_file(["x"]), r"cannot be read as tensors: TypeError"),
        ("a.npy", raw(b""), r"cannot be read as tensors: EOFError"),
        ("a.npz", lambda path: np.savez(path, input=np.zeros((4, 8), "S3")), r"the array 'input' is no tensor"),
        ("a.npz", lambda path: np.save(path.open("wb"), np.zeros((4, 8))), r"cannot be read as tensors: "),
        ("a.npz", raw(packed(10**8)), r"has \d+ bytes and would be 8\d+ in memory: save it without compression"),
        ("a.npz", lambda path: np.savez(path), r"lacks input"),
        ("a.safetensors", raw(b""), r"cannot be read as tensors: "),
        ("a.safetensors", raw(b"\xff" * 64), r"cannot be read as tensors: "),
        ("a.pt", os.mkfifo, r"there is no calibration file"),
        ("a.txt", os.mkfifo, r"there is no calibration file"),
        ("a.jsonl", raw(b"[" * 50_000), r"a\.jsonl:1 is not JSON: RecursionError"),
        ("a.jsonl", raw(b'{"' + b"k" * 10**5 + b'": 1}'), r"a\.jsonl:1 has the keys k+\.\.\.k+; an object with"),
    ],
    ids=range(27),
)
def test_files(name: str, write: Callable[[Path], object], expected: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    with pytest.raises(CalibrationError, match=expected) as caught:
        data = open_calibration(str(tmp_path / name))
        data.shapes()
        list(data.batches(SOURCE))
    assert str(tmp_path / name) in str(caught.value) and len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((X[:2].to_sparse(),), r"calibration batch 0: input_1 is a tensor of the kind sparse_coo"),
        ((X[:2].to("meta"),), r"calibration batch 0: input_1 is on the meta device"),
        ({0: X[:2]}, r"calibration batch 0 is called as model\(0=Tensor\)"),
        ({None: X[:2], "b": 1}, r"calibration batch 0 is called as"),
        ((circle(),), r"calibration batch 0 is nested too deeply, or contains itself"),
        ((X[:2].to(torch.complex64),), r"is torch\.complex64"),
        (np.array([object()]), r"calibration batch 0 is a ndarray"),
        ((np.zeros((2, 8), np.float32),), r"input_1 is a ndarray, but the model was captured with a FakeTensor"),
        ((), r"calibration batch 0 is called as model\(\)"),
    ],
    ids=range(9),
)
def test_batches(batch: Any, expected: str) -> None:
    program = torch.export.export(SOURCE.model, SOURCE.args)
    with pytest.raises(CalibrationError, match=expected):
        qcompile.quantize(program, recipe="fp8", calibration=[batch], progress=False)
