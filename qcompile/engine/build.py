"""Builds a TensorRT engine from an ONNX file, or from what fills a network, and reports what it does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qcompile.engine.backend import Backend, find_backend
from qcompile.engine.graph import OnnxGraph
from qcompile.engine.judge import MIN_KEYS, NO_KERNEL, Judgement, judge
from qcompile.engine.listeners import Step
from qcompile.engine.network import NetworkGraph, NetworkSource
from qcompile.engine.precheck import precheck
from qcompile.engine.profiles import Profile
from qcompile.engine.report import EngineReport, check_keys
from qcompile.engine.trt_build import Built, Fill, build, parse_file
from qcompile.errors import EngineError


def build_engine(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    target: str | None = None,
    profiles: Profile | Sequence[Profile] | None = None,
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
        profiles: for files with dynamic shapes, {input name: (min, opt, max)} with shapes in elements, or several.
        expect: see `EngineReport.check`; a shortfall is an error, and nothing is written.
        progress: show a progress bar on stderr.

    Raises:
        EngineError: the file, the target, a profile or the combination cannot be built.
        ExpectationError: the engine falls short of `expect`.
    """
    check_keys(expect or {})
    destination = _destination(output)
    graph = OnnxGraph.load(model)
    backend = find_backend(target)
    precheck(graph, backend.target)
    return _build(parse_file(model, graph, backend), backend, destination, profiles, expect, progress)


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
    destination = _destination(output)
    backend = find_backend(target, source.package)

    def fill(network: Any, log: Any) -> OnnxGraph:
        graph = NetworkGraph(backend.trt, network, source.fill(network))
        precheck(graph, backend.target)
        return graph

    return _build(fill, backend, destination, profiles, expect, progress)


def _build(
    fill: Fill,
    backend: Backend,
    destination: Path | None,
    profiles: Profile | Sequence[Profile] | None,
    expect: Mapping[str, int] | None,
    progress: bool,
) -> EngineReport:
    started = time.perf_counter()
    with _progress(f"sm{backend.target}", progress) as step:
        built = build(fill, backend, profiles, step)
    report = _report(built, backend, time.perf_counter() - started)
    report.check(expect or {})
    if destination is not None:
        _write(destination, built.plan)
    return report


def _report(built: Built, backend: Backend, seconds: float) -> EngineReport:
    judged = []
    for index in range(max(1, len(built.profiles))):
        minima = {name: shapes[0] for name, shapes in built.profiles[index].items()} if built.profiles else {}
        mine = [layer for layer in built.layers if layer.profile == index]
        judged.append(judge(mine, built.graph, built.graph.static_shapes(minima)))
    worst = max(range(len(judged)), key=lambda index: judged[index].badness)
    result = judged[worst]
    return EngineReport(
        target=f"sm{backend.target}",
        builder=backend.version,
        kernels=result.kernels,
        attention=result.attention,
        gemms=result.gemms,
        convolutions=result.convolutions,
        precisions=result.precisions,
        not_low_precision=result.not_low_precision,
        notices=_notices(result, worst, built.profiles),
        bytes=built.plan.nbytes,
        seconds=seconds,
        layers=built.layers,
    )


def _notices(result: Judgement, index: int, profiles: list[Profile]) -> list[str]:
    notices = []
    if len(profiles) > 1:
        notices.append(f"{len(profiles)} profiles: the counts are those of profile {index}, the worst of them")
    shortest = _shortest_axis(profiles[index]) if profiles else None
    unexplained = [
        gap.module for gap in result.not_low_precision if gap.kind == "attention" and NO_KERNEL in gap.reason
    ]
    if unexplained and shortest is not None and shortest < MIN_KEYS:
        notices.append(
            f"{len(unexplained)} quantized attentions are not fused in FP8, and the profile has an axis as short as "
            f"{shortest}: if that is the key sequence, raise its minimum to {MIN_KEYS} ({', '.join(unexplained)})"
        )
    if result.short_keys:
        modules = ", ".join(module for module, _ in result.short_keys)
        fewest = min(keys for _, keys in result.short_keys)
        advice = f"raise the profile's minimum to {MIN_KEYS}" if profiles else f"export with at least {MIN_KEYS} tokens"
        notices.append(
            f"{len(result.short_keys)} quantized attentions are not fused in FP8, because their key sequence can be as "
            f"short as {fewest}: TensorRT fuses from {MIN_KEYS} on; {advice} ({modules})"
        )
    return notices


def _shortest_axis(profile: Profile) -> int | None:
    """The smallest minimum of an axis, other than the first, that the profile leaves dynamic."""
    shapes = ((least, most) for least, _, most in profile.values())
    sizes = [low for least, most in shapes for low, high in list(zip(least, most, strict=True))[1:] if low != high]
    return min(sizes, default=None)


def _destination(output: str | os.PathLike[str] | None) -> Path | None:
    if output is None:
        return None
    path = Path(output)
    if not path.parent.is_dir():
        raise EngineError(f"cannot write {path}: the directory {path.parent} does not exist")
    if path.is_dir():
        raise EngineError(f"cannot write {path}: it is a directory")
    return path


def _write(path: Path, plan: Any) -> None:
    """Write beside the final name and move into place, so that a crash or a full disk leaves the old file whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(memoryview(plan))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise EngineError(f"cannot write the engine to {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _progress(target: str, show: bool) -> Iterator[Step]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task(f"engine for {target}", total=None)

        def step(phase: str, done: int, total: int) -> None:
            bar.update(task, description=f"engine for {target}: {phase}", completed=done, total=total)

        yield step
