"""The two ways to run the tests of properties: the same examples every day, and others under `.ci/find`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
PROPERTY = """
from hypothesis import given, settings, strategies as st

@settings(max_examples=5)
@given(number=st.integers())
def test_a_property(number):
    with open("seen", "a") as file:
        file.write(f"{number}\\n")
"""


def examples(folder: Path, *options: str) -> list[str]:
    """What a test that allows itself five examples is tried with."""
    folder.mkdir()
    (folder / "conftest.py").write_bytes(CONFTEST.read_bytes())
    (folder / "test_it.py").write_text(PROPERTY, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "test_it.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return (folder / "seen").read_text(encoding="utf-8").split()


@pytest.mark.slow
def test_everyday_tries_the_same_examples_and_find_a_thousand_others(tmp_path: Path) -> None:
    every, day = examples(tmp_path / "every"), examples(tmp_path / "day")
    assert every == day and len(every) == 5
    find = ("--hypothesis-profile=find", "-m", "hypothesis")
    once, again = examples(tmp_path / "once", *find), examples(tmp_path / "again", *find)
    assert len(once) >= 1000 and len(again) >= 1000 and once != again
