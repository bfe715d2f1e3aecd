"""Builds a TensorRT engine from an ONNX file, or from what fills a network, and reports what it does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from qcompile.engine.backend import Backend, find_backend
from qcompile.engine.generation import generation_profiles
from qcompile.engine.graph import OnnxGraph
from qcompile.engine.limits import GenerationProfiles
from qcompile.engine.listeners import Step
from qcompile.engine.network import NetworkGraph, NetworkSource
from qcompile.engine.precheck import check_operators, precheck
from qcompile.engine.profiles import Profile, listed
from qcompile.engine.report import EngineReport, check_keys
from qcompile.engine.summary import summarize
from qcompile.engine.trt_build import Fill, build, parse_file
from qcompile.errors import EngineError
from qcompile.files import replaced
from qcompile.onnxfile.read import external_files
from qcompile.outputs import check_distinct, check_room, check_writable
from qcompile.progress import progress_bar

Profiles = Profile | Sequence[Profile] | GenerationProfiles | Literal["generate"] | None


def build_engine(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    target: str | None = None,
    profiles: Profiles = None,
    expect: Mapping[str, int] | None = None,
    progress: bool = True,
) -> EngineReport:
    """Build a TensorRT engine from an ONNX file and say which kernels it runs.

    `tensorrt` is used when it is installed and the target is the GPU of this machine; otherwise `tensorrt_rtx`
    compiles ahead of time, without a GPU. Types are those in the file (strongly typed).

    Args:
        model: path of an ONNX file; external data is found beside it.
        output: where to write the engine; None builds and judges only. It replaces an existing file when complete.
        target: compute capability, such as "sm89", "sm120" or "8.9". None: the GPU of this machine.
        profiles: for files with dynamic shapes, {dimension or input: (min, opt, max)}, of sizes or shapes, or several.
            "generate", or `GenerationProfiles` with limits: those of a decoder with a cache, `prefill` and `decode`.
        expect: see `EngineReport.check`; a shortfall is an error, and nothing is written.
        progress: show a progress bar on stderr.

    Raises:
        EngineError: the file, the target, a profile or the combination cannot be built.
        ExpectationError: the engine falls short of `expect`.
    """
    check_keys(expect or {})
    given = checked(profiles)
    destination = _destination(output)
    graph = OnnxGraph.load(model)
    named = generation_profiles(graph, given) if isinstance(given, GenerationProfiles) else {}
    backend = find_backend(target)
    precheck(graph, backend.target)
    if destination is not None and graph.path is not None:
        weights = external_files(graph.model, graph.path)
        own = [("the ONNX file", model), *(("its file of weights", path) for path in weights)]
        check_distinct({"the engine": destination}, own, EngineError)
    if backend.package == "tensorrt_rtx":
        check_operators(graph)
    if destination is not None:
        check_room({destination: graph.weight_bytes()}, EngineError)
    chosen = list(named.values()) if isinstance(given, GenerationProfiles) else given
    fill = parse_file(graph.path or model, graph, backend)
    return _build(fill, backend, destination, chosen, expect, progress, list(named))


def checked(profiles: Profiles) -> GenerationProfiles | list[Profile]:
    """The profiles, or limits of which a file makes them. Raises EngineError for what no file could make a profile."""
    if isinstance(profiles, GenerationProfiles):
        return profiles
    if isinstance(profiles, str):
        if profiles != "generate":
            raise EngineError(f"profiles {profiles!r}: the one word for them is 'generate'")
        return GenerationProfiles()
    return listed(profiles)


def build_network(
    source: NetworkSource,
    output: str | os.PathLike[str] | None = None,
    *,
    target: str | None = None,
    profiles: Profile | Sequence[Profile] | None = None,
    expect: Mapping[str, int] | None = None,
    progress: bool = True,
) -> EngineReport:
    """Build a TensorRT engine from what fills a network without a file, with the same report.

    Args:
        source: adds the layers; it names the TensorRT package that it does so with, which has to build for `target`.

    The rest is as in `build_engine`.
    """
    check_keys(expect or {})
    listed(profiles)
    destination = _destination(output)
    backend = find_backend(target, source.package)

    def fill(network: Any, log: Any) -> OnnxGraph:
        graph = NetworkGraph(backend.trt, network, source.fill(network))
        precheck(graph, backend.target)
        return graph

    return _build(fill, backend, destination, listed(profiles), expect, progress)


def _build(
    fill: Fill,
    backend: Backend,
    destination: Path | None,
    profiles: Sequence[Profile],
    expect: Mapping[str, int] | None,
    progress: bool,
    names: Sequence[str] = (),
) -> EngineReport:
    started = time.perf_counter()
    with _progress(f"sm{backend.target}", progress) as step:
        built = build(fill, backend, profiles, step)
    report = summarize(built, backend, time.perf_counter() - started, names)
    report.check(expect or {})
    if destination is not None:
        _write(destination, built.plan)
    return report


def _destination(output: str | os.PathLike[str] | None) -> Path | None:
    if output is None:
        return None
    check_writable(Path(output), error=EngineError)
    return Path(output)


def _write(path: Path, plan: Any) -> None:
    with replaced(path, EngineError) as new, open(new, "wb") as file:
        file.write(memoryview(plan))


@contextmanager
def _progress(target: str, show: bool) -> Iterator[Step]:
    name = f"engine for {target}"
    with progress_bar(name, None, show) as bar:
        yield lambda phase, done, total: bar.phase(f"{name}: {phase}", done, total)
