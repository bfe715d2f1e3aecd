"""Headers of safetensors files: what the library refuses is refused, and what it takes is read as it reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from qcompile.checkpoint.files.headers import read_header
from qcompile.errors import CheckpointError

A, B = {"dtype": "I8", "shape": [2, 4], "data_offsets": [0, 8]}, {"dtype": "I8", "shape": [4], "data_offsets": [8, 12]}
GOOD: list[dict[str, Any]] = [
    {"a": A, "b": B},
    {"b": B, "a": A, "__metadata__": {"format": "pt"}},
    {"a": A, "b": B, "__metadata__": None, "none": {**B, "shape": [0, 3], "data_offsets": [8, 8]}},
    {"a": {**A, "of no meaning": 1}, "b": B},
]
BAD: dict[str, tuple[Any, str]] = {
    "negative": ({"a": {**A, "data_offsets": [-4, 4]}, "b": B}, "entry for a is broken"),
    "negative shape": ({"a": {**A, "shape": [-2, -4]}, "b": B}, "entry for a is broken"),
    "overlap": ({"a": A, "b": {**B, "data_offsets": [4, 8]}, "c": {**B, "data_offsets": [8, 12]}}, "b starts at byte"),
    "the same bytes": ({"a": A, "b": B, "c": B}, "c starts at byte"),
    "hole": ({"a": {**A, "shape": [2, 2], "data_offsets": [0, 4]}, "b": B}, "b starts at byte"),
    "bytes before": ({"b": {**B, "data_offsets": [8, 12]}}, "b starts at byte"),
    "bytes behind": ({"a": A}, "its tensors end at byte"),
    "beyond": ({"a": A, "b": {**B, "shape": [5], "data_offsets": [8, 13]}}, "is truncated: b ends at byte"),
    "fraction": ({"a": {**A, "shape": [2.5, 4]}, "b": B}, "entry for a is broken"),
    "text": ({"a": {**A, "shape": ["2", 4]}, "b": B}, "entry for a is broken"),
    "truth": ({"a": A, "b": {**B, "shape": [True, 4]}}, "entry for b is broken"),
    "three offsets": ({"a": {**A, "data_offsets": [0, 8, 8]}, "b": B}, "entry for a is broken"),
    "no integers of 64 bits": ({"a": {**A, "shape": [2, 4, 1 << 80, 0]}, "b": B}, "entry for a is broken"),
    "list of fields": ({"a": list(A.values()), "b": B}, "entry for a is broken"),
    "metadata list": ({"a": A, "b": B, "__metadata__": []}, "its __metadata__ is not text"),
    "metadata number": ({"a": A, "b": B, "__metadata__": {"format": 1}}, "its __metadata__ is not text"),
    "twice": (f'{{"a": {json.dumps(A)}, "b": {json.dumps(B)}, "a": {json.dumps(A)}}}', "there twice"),
    "field twice": (f'{{"a": {json.dumps(A)[:-1]}, "shape": [4, 2]}}, "b": {json.dumps(B)}}}', "there twice"),
    "other encoding": (json.dumps({"a": A, "b": B}).encode("utf-16"), "is no JSON"),
    "depth": ('{"a":' + "[" * 100_000, "is no JSON"),
    "control characters": ({"a\x1b[31m": {**A, "dtype": "\x1b"}, "b": B}, r"a\\x1b\[31m has the dtype \\x1b,"),
}
STRICTER = ("list of fields", "twice")  # the library takes the last of two, and fields by their order


def file(path: Path, header: Any) -> Path:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(12)))
    return path


@pytest.mark.parametrize("header", GOOD)
def test_what_the_library_takes_is_read_as_it_reads_it(header: dict[str, Any], tmp_path: Path) -> None:
    path = file(tmp_path / "m.safetensors", header)
    found = read_header(path)
    with safe_open(path, "pt") as opened:
        assert set(found) == set(opened.keys())
        for name, tensor in found.items():
            assert torch.equal(tensor.rows(0, tensor.shape[0]), opened.get_tensor(name))


@pytest.mark.parametrize("case", BAD)
def test_what_the_library_refuses_is_refused(case: str, tmp_path: Path) -> None:
    path = file(tmp_path / "m.safetensors", BAD[case][0])
    if case not in STRICTER:
        with pytest.raises(SafetensorError), safe_open(path, "pt"):
            pass
    with pytest.raises(CheckpointError, match=BAD[case][1]):
        read_header(path)
