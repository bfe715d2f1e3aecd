"""Time on the device's own clock: CUDA graphs, cold caches, many samples, the candidates in turn.

A GPU slows down as it warms up and draws power, so candidates that are compared run side by side: a short burst of
each, then the next, round after round. Before every sample something larger than the L2 cache is written: what a sample
reads comes from memory, as it does in a model that does not fit there, and the host is ahead of the device when the
clock starts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.utils import _pytree as pytree

from benchmarks.gpu.chips import Machine

Run = Callable[[], object]


class Recorded:
    """Something to time by calling `run`."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def fresh_outputs(self) -> list[torch.Tensor]:
        """What one more run computes."""
        return [output.clone() for output in _tensors(self.run())]


class Graph(Recorded):
    """A CUDA graph, which fills the same `outputs` each time."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: list[torch.Tensor]) -> None:
        super().__init__(graph.replay)
        self.outputs = outputs

    def fresh_outputs(self) -> list[torch.Tensor]:
        for output in self.outputs:
            output.fill_(torch.nan)  # nothing may stay from an earlier run
        self.run()
        return [output.clone() for output in self.outputs]


def _tensors(result: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def record(call: Run, machine: Machine, *, graph: bool = True, warmup: int = 3) -> Recorded:
    """`call` as a CUDA graph, or as it is with `graph=False` and on a CPU; compiled and warm."""
    if machine.device.type == "cuda" and graph:
        return _captured(call, warmup)
    for _ in range(warmup):
        call()
    return Recorded(call)


def _captured(call: Run, warmup: int) -> Graph:
    side = torch.cuda.Stream()  # what capture asks for: warm on another stream than the default one
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return Graph(graph, _tensors(result))


@dataclass
class Samples:
    """Milliseconds, by round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def all(self) -> list[float]:
        return [sample for samples in self.rounds for sample in samples]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    def quartiles(self) -> tuple[float, float]:
        values = self.all
        if len(values) < 2:
            return values[0], values[0]
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return low, high

    def over(self, other: Samples) -> float:
        """How many times as fast as `other` this is: the median of the ratios of the rounds that both have."""
        pairs = zip(self.rounds, other.rounds, strict=False)
        return statistics.median(statistics.median(b) / statistics.median(a) for a, b in pairs)


class Clock:
    """Takes samples on one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        size = 2 * (machine.l2_bytes or 0)
        self.flush = torch.empty(size, dtype=torch.int8, device=machine.device) if size else None

    def burst(self, run: Run, seconds: float, at_least: int = 3) -> list[float]:
        """Milliseconds of each of as many runs as take about `seconds`."""
        first = self._samples(run, 1)[0]
        return self._samples(run, max(at_least, min(1000, int(seconds * 1e3 / max(first, 1e-3)))))

    def _samples(self, run: Run, count: int) -> list[float]:
        if self.machine.device.type != "cuda":
            return [_wall(run) for _ in range(count)]
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for start, end in marks:
            if self.flush is not None:
                self.flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in marks]


def _wall(run: Run) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def in_turn(clock: Clock, runs: Mapping[str, Run], rounds: int, seconds: float) -> Iterator[dict[str, Samples]]:
    """Bursts of about `seconds` of every run, round after round; yields all samples so far after each round."""
    samples = {name: Samples() for name in runs}
    for index in range(rounds):
        names = list(runs)[:: 1 if index % 2 == 0 else -1]  # no one always comes after the same one
        for name in names:
            samples[name].rounds.append(clock.burst(runs[name], seconds))
        yield samples
