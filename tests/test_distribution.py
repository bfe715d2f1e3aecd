"""What is in the sdist and in the wheel that is made of it, and the version that stands in one place."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import qcompile
from qcompile.cli import main

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", ".*cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of the repository, and a wheel of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=NOT_SOURCE)
    sdist = _build(folder / "source", "sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, _build(unpacked, "wheel", folder)


def _build(source: Path, kind: str, into: Path) -> Path:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return into / done.stdout.splitlines()[-1]


def _sources(*packages: str) -> set[str]:
    """Every file of these packages, as a wheel names it."""
    files = (path for package in packages for path in (ROOT / package).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def _metadata(wheel: zipfile.ZipFile) -> Message:
    return message_from_bytes(wheel.read(f"qcompile-{qcompile.__version__}.dist-info/METADATA"))


def test_the_wheel_holds_both_packages_whole_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == _sources("passes", "qcompile")
        assert {"passes/py.typed", "qcompile/py.typed", "qcompile/recipe/builtin/fragments/exclusions.yaml"} <= names
        assert wheel.read("qcompile/constraints.txt") == (ROOT / "constraints.txt").read_bytes()  # here it is a link
        licence = wheel.read(f"qcompile-{qcompile.__version__}.dist-info/licenses/LICENSE")
        assert licence == (ROOT / "LICENSE").read_bytes() and b"Version 2.0, January 2004" in licence


def test_what_the_wheel_says_of_itself(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        said = _metadata(wheel)
        scripts = wheel.read(f"qcompile-{qcompile.__version__}.dist-info/entry_points.txt").decode()
    assert said["Version"] == qcompile.__version__
    assert said["License-Expression"] == "Apache-2.0" and said["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    assert {"demo", "transformers", "tensorrt-rtx"} <= set(said.get_all("Provides-Extra", []))
    assert "qcompile = qcompile.cli:main" in scripts and "[torch_dynamo_backends]" in scripts


def test_the_sdist_is_the_repository(built: tuple[Path, Path]) -> None:
    """With the tests, and with what they and its pages read."""
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        constraints = archive.getmember(f"qcompile-{qcompile.__version__}/qcompile/constraints.txt")
    assert constraints.isfile(), "a link out of the package does not unpack everywhere"
    pages = {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
    assert {".ci/run", "constraints-oldest.txt", *pages} <= names
    assert _sources("passes", "qcompile", "tests", "docs", "examples", "benchmarks") <= names


def test_the_version_stands_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{qcompile.__version__}\n"
    found = [path for path in (ROOT / "qcompile").rglob("*.py") if f'"{qcompile.__version__}"' in path.read_text()]
    assert [path.name for path in found] == ["version.py"]
