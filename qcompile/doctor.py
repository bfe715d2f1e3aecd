"""What is installed here, whether it fits what qcompile declares, and what can be done with it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Literal

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from passes.capabilities import UNITS
from qcompile.compat import probes
from qcompile.engine.backend import built_for
from qcompile.engine.capability import lacking
from qcompile.errors import EngineError
from qcompile.messages import first_line
from qcompile.recipe import list_recipes, load_recipe
from qcompile.recipe.asked import asked_formats
from qcompile.report.base import ReportBase
from qcompile.torch_tensorrt.environment import require_torch_tensorrt
from qcompile.version import __version__

_NOT_FOR_USERS = ("demo", "dev")  # extras
_NOT_IN_ONNXRUNTIME = [name for name, units in UNITS.items() if not units.onnxruntime]


@dataclass(frozen=True)
class Package:
    """A requirement of qcompile's metadata.

    Attributes:
        extra: what it is for; empty for what everything needs.
        declared: the range of versions.
        tested: the version that this qcompile is tested with.
        installed: None if it is not.
        problem: why it does not do; empty if it does, or if it is of an extra and not installed.
    """

    name: str
    extra: str
    declared: str
    tested: str
    installed: str | None
    problem: str


@dataclass(frozen=True)
class Builder:
    """A package that builds engines, the GPUs that it builds for here, and why it cannot, if so."""

    name: str
    version: str
    targets: list[str]
    problem: str


@dataclass(frozen=True)
class Inside:
    """Names of a library that it promises nothing of and that are used here: how many, and what is wrong with some."""

    library: str
    names: int
    problems: list[str]


@dataclass(frozen=True)
class Route:
    """What can be done with a shipped recipe: run its files in ONNX Runtime, build engines for these targets."""

    recipe: str
    onnxruntime: bool
    engines: list[str]


class Findings(ReportBase):
    """All that `examine` found; `problems` is empty where nothing declared is broken."""

    kind: Literal["doctor"] = "doctor"
    versions: dict[str, str]
    packages: list[Package]
    providers: list[str]
    builders: list[Builder]
    devices: list[str]
    insides: list[Inside]
    routes: list[Route]
    problems: list[str]

    @property
    def passed(self) -> bool:
        return not self.problems


def examine() -> Findings:
    """Look at the packages, providers, builders and devices of this machine. Nothing is built or run."""
    packages = list(_packages())
    providers, broken = _providers()
    builders = list(_builders())
    problems = [f"{p.name}: {p.problem}" for p in packages if p.problem] + broken
    problems += [f"{builder.name}: {builder.problem}" for builder in builders if builder.problem]
    insides = _insides()
    problems += [problem for inside in insides for problem in inside.problems]
    return Findings(
        versions={"qcompile": __version__, "python": platform.python_version()},
        packages=packages,
        providers=providers,
        builders=builders,
        devices=_devices(),
        insides=insides,
        routes=[_route(name, bool(providers), builders) for name in list_recipes()],
        problems=problems,
    )


def _packages() -> Iterator[Package]:
    tested = _tested()
    for text in metadata.requires("qcompile") or ():
        requirement = Requirement(text)
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"'") if requirement.marker else ""
        if extra in _NOT_FOR_USERS:
            continue
        yield _package(requirement, extra, tested.get(canonicalize_name(requirement.name), ""))


def _tested() -> dict[str, str]:
    """Package -> version, as constraints.txt pins them, which is part of the package."""
    lines = (resources.files("qcompile") / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.partition("==") for line in lines if "==" in line)
    return {canonicalize_name(name): version for name, _, version in pins}


def _package(requirement: Requirement, extra: str, tested: str) -> Package:
    name, declared = requirement.name, requirement.specifier
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        problem = "" if extra else f"not installed: pip install '{name}{declared}'"
        return Package(name, extra, str(declared), tested, None, problem)
    fits = declared.contains(installed, prereleases=True)
    problem = "" if fits else f"{installed} is outside of what is declared: pip install '{name}{declared}'"
    return Package(name, extra, str(declared), tested, installed, problem)


def _providers() -> tuple[list[str], list[str]]:
    """Providers of ONNX Runtime, and why there are none though it is installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return [], []
    try:
        return list(importlib.import_module("onnxruntime").get_available_providers()), []
    except Exception as error:  # whatever a broken installation raises
        return [], [f"onnxruntime cannot be imported: {first_line(error)}"]


def _builders() -> Iterator[Builder]:
    for name in ("tensorrt_rtx", "tensorrt"):
        if importlib.util.find_spec(name) is not None:
            try:
                trt = importlib.import_module(name)
                yield Builder(name, trt.__version__, [f"sm{target}" for target in built_for(trt, name)], "")
            except Exception as error:  # a library that is missing, or of another version
                yield Builder(name, "", [], f"cannot be imported: {first_line(error)}")
    if importlib.util.find_spec("torch_tensorrt") is not None:
        try:
            yield Builder("torch_tensorrt", require_torch_tensorrt().__version__, [], "")
        except EngineError as error:
            yield Builder("torch_tensorrt", "", [], str(error))


def _insides() -> list[Inside]:
    """Probe every private name; libraries say on import what is no news here."""
    found: dict[str, Inside] = {}
    known = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for private in probes():
                before = found.get(private.library, Inside(private.library, 0, []))
                problem = private.problem()
                wrong = [*before.problems, *([problem] if problem else [])]
                found[private.library] = Inside(private.library, before.names + 1, wrong)
    finally:
        logging.disable(known)
    return list(found.values())


def _devices() -> list[str]:
    found = [f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)} (sm{major}{minor})")
    return found


def _route(name: str, has_onnxruntime: bool, builders: list[Builder]) -> Route:
    formats = asked_formats(load_recipe(name))
    targets = dict.fromkeys(target for builder in builders for target in builder.targets)
    runs = has_onnxruntime and not any(format in _NOT_IN_ONNXRUNTIME for format in formats)
    able = [t for t in targets if not any(lacking(format, int(t.removeprefix("sm"))) for format in formats)]
    return Route(name, runs, able)
