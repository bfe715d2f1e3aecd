"""The ends of `.ci/versions` are what pyproject.toml declares and what constraints.txt names."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def version(requirement: Requirement, operator: str) -> Version:
    (specifier,) = requirement.specifier
    assert specifier.operator == operator, requirement
    return Version(specifier.version)


def pins(end: str) -> dict[str, Version]:
    lines = (ROOT / f"constraints{end}.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(requirement.name): version(requirement, "==") for requirement in requirements}


def declared(extra: str | None = None) -> Iterator[Requirement]:
    """What `qcompile`, or an extra of it, asks for, with the extras that the extra is made of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            for part in requirement.extras:
                yield from declared(part)
        else:
            yield requirement


def test_the_oldest_end_is_every_declared_floor() -> None:
    requirements = [*declared(), *declared("dev")]
    floors = {canonicalize_name(r.name): version(r, ">=") for r in requirements if r.specifier}
    assert pins("-oldest") == floors


@pytest.mark.parametrize("end", ["", "-newest"])
def test_every_requirement_of_the_tests_is_pinned(end: str) -> None:
    assert set(pins(end)) == {canonicalize_name(r.name) for r in [*declared(), *declared("dev")]}
