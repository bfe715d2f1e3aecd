"""benchmarks.same_files finds what differs, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.same_files import ROOT, compared, differences


def test_what_one_side_lacks_differs() -> None:
    assert differences({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "0", "d": "3"}) == ["b", "c", "d"]


@pytest.mark.slow
def test_a_scale_that_moved_is_found(tmp_path: Path) -> None:
    for package in ("passes", "qcompile"):
        shutil.copytree(ROOT / package, tmp_path / package)
    (same,) = compared(tmp_path, "bert", ["fp8_gemm"])
    assert same["ok"] and same["compared"] > 20
    formats = tmp_path / "passes" / "formats.py"
    formats.write_text(formats.read_text().replace("448.0, -448.0)\n", "224.0, -224.0)\n", 1))
    (other,) = compared(tmp_path, "bert", ["fp8_gemm"])
    assert not other["ok"] and other["of"] > len(other["differ"])  # which are shown
