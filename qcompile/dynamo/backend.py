"""The entry point `qcompile` of the group `torch_dynamo_backends`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from passes.lower.device import Device
from qcompile.dynamo.compiled import CompiledGraph
from qcompile.dynamo.explain import CompileReport, remember, report_of
from qcompile.dynamo.inductor import compile_inductor
from qcompile.dynamo.inputs import Main, weights_as_inputs
from qcompile.dynamo.middle import lower
from qcompile.dynamo.options import Options
from qcompile.dynamo.trace import Captured, Traced, trace


def qcompile_backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile what Dynamo captured; `torch.compile(model, backend="qcompile", options=...)` calls it.

    Args:
        gm: Dynamo's graph; parameters and buffers are inputs.
        example_inputs: a tensor or a size for each of its placeholders.
        options: see `qcompile.dynamo.options.Options`.
        mode: as in torch.compile.

    Raises:
        QCompileError, which Dynamo shows in a BackendCompilerFailed.
    """
    compiler = _Compiler(Options.read(options, mode), Captured.read(gm, example_inputs))
    traced = compiler.trace([example_inputs[i].item() for i in compiler.captured.scalars])
    compiled = CompiledGraph(compiler.bind, list(traced.weights.values()), traced.inputs, compiler.captured.scalars)
    with torch._C._DisableAutocast():  # the graph has the casts that autocast makes
        compiled.prepare(example_inputs)
    remember(compiled, compiler.reports, [example_inputs[i] for i in traced.weights.values()])
    return compiled


@dataclass
class _Compiler:
    """Makes a function for the weights of a call; functions whose graphs are equal are compiled once."""

    options: Options
    captured: Captured
    reports: list[CompileReport] = field(default_factory=list)
    _traced: dict[tuple[Any, ...], Traced] = field(default_factory=dict)
    _functions: dict[object, Callable[..., Any]] = field(default_factory=dict)

    def trace(self, numbers: Sequence[Any]) -> Traced:
        """The graph with these Python numbers in it."""
        key = tuple(numbers)
        if key not in self._traced:
            self._traced[key] = trace(self.captured, numbers)
        return self._traced[key]

    def bind(self, arguments: Sequence[Any]) -> tuple[Callable[..., Any], Sequence[torch.Tensor | int]]:
        """The function for the weights and numbers among `arguments`, and what it reads beside the user's inputs."""
        start = time.perf_counter()
        traced = self.trace([arguments[i].item() for i in self.captured.scalars])
        weights = {name: arguments[index] for name, index in traced.weights.items()}
        lowered = lower(traced, weights, self.options, _device(arguments))
        main = weights_as_inputs(lowered.gm, traced, weights, self.captured.fake_mode)
        middle = time.perf_counter() - start
        if main.structure not in self._functions:
            self._functions[main.structure] = self._compile(main)
            seconds = {"passes": middle, self.options.target: time.perf_counter() - start - middle}
            self.reports.append(report_of(lowered, main, self.options, _device(arguments), seconds))
        return self._functions[main.structure], main.constants

    def _compile(self, main: Main) -> Callable[..., Any]:
        if self.options.target == "eager":
            function: Callable[..., Any] = main.gm.forward
            return function
        return compile_inductor(main.gm, main.fakes, self.captured.fake_mode, self.options)


def _device(arguments: Sequence[Any]) -> Device:
    """The kind of device that the graph runs on: that of its first tensor that is not a number on the CPU."""
    devices = [a.device for a in arguments if isinstance(a, torch.Tensor)]
    on_gpu = [device for device in devices if device.type != "cpu"]
    return Device.of((on_gpu or devices or [torch.device("cpu")])[0])
