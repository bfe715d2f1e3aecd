"""The entry point `qcompile` of the group `torch_dynamo_backends`."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.lower.device import Device
from qcompile.compat.torch import without_autocast
from qcompile.dynamo.calls import check_expected, current_call
from qcompile.dynamo.compiled import Binding, CompiledGraph, keep
from qcompile.dynamo.explain import CompileReport, report_of
from qcompile.dynamo.hooks import install
from qcompile.dynamo.inductor import compile_inductor
from qcompile.dynamo.inputs import Main, weights_as_inputs
from qcompile.dynamo.middle import Lowered, lower
from qcompile.dynamo.models import owners
from qcompile.dynamo.names import Naming
from qcompile.dynamo.options import Options
from qcompile.dynamo.registry import Reported, remember
from qcompile.dynamo.trace import Captured, Traced, trace
from qcompile.process import old_objects_rest

logger = logging.getLogger("qcompile")

_MANY = 8  # values of a number, after which it is worth saying so


@old_objects_rest()
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
    call = current_call()
    is_region = call is not None and call.region.given is options  # its options, read when `torch.compile` was called
    chosen = call.region.options if call is not None and is_region else Options.read(options, mode)
    compiler = _Compiler(chosen, Captured.read(gm, example_inputs))
    traced = compiler.trace([example_inputs[i].item() for i in compiler.captured.scalars])
    captured = compiler.captured
    weights = [i for i in traced.weights.values() if i < len(example_inputs)]
    compiled = CompiledGraph(
        compiler.bind,
        weights,
        [packed.position for packed in captured.packed],
        traced.inputs,
        captured.scalars,
        _wanted(captured.gm),
    )
    with without_autocast():  # the graph has the casts that autocast makes
        compiled.prepare(example_inputs)
    remember(compiled, compiler.reports)
    return compiled


@dataclass
class _Compiler:
    """Makes a function for the weights of a call; functions whose graphs are equal are compiled once."""

    options: Options
    captured: Captured
    reports: list[Reported] = field(default_factory=list)
    _traced: dict[tuple[Any, ...], Traced] = field(default_factory=dict)
    _functions: dict[object, Callable[..., Any]] = field(default_factory=dict)
    _reported: dict[int, Reported] = field(default_factory=dict)

    def trace(self, numbers: Sequence[Any]) -> Traced:
        """The graph with these Python numbers in it."""
        key = tuple(map(repr, numbers))  # -0.0 is 0.0 otherwise
        if key not in self._traced:
            if len(self._traced) == _MANY:
                logger.warning(
                    "a graph was compiled for the %dth value of a Python number that the model is called with (now %s):"
                    " hand it over as a tensor, which is compiled once for all values",
                    _MANY + 1,
                    ", ".join(map(str, numbers)),
                )
            keep(self._traced, key, trace(self.captured, numbers))
        return self._traced[key]

    def bind(self, arguments: Sequence[Any]) -> Binding:
        """The function for the weights and numbers among `arguments`, and what it reads beside the user's inputs."""
        start = time.perf_counter()
        traced = self.trace([arguments[i].item() for i in self.captured.scalars])
        unpacked = self.captured.unpacked(arguments)
        traced = traced.named(_naming(traced, unpacked))
        weights = {name: unpacked[index] for name, index in traced.weights.items()}
        lowered = lower(traced, weights, self.options, _device(arguments))
        if current_call() is None:  # or else at the end of the call: other graphs have layers, too
            check_expected(lowered.layers, self.options.expect, {})
        main = weights_as_inputs(lowered.gm, traced, weights, self.captured.fake_mode)
        middle = time.perf_counter() - start
        constants: Sequence[torch.Tensor | int] = []
        if self.options.target == "torch_tensorrt":
            function = self._engine(traced, lowered, unpacked)
        else:
            if main.structure not in self._functions:
                keep(self._functions, main.structure, self._compile(main))
            function = self._functions[main.structure]
            given = range(len(arguments))  # other positions are those of tensors that were unpacked
            constants = [unpacked[c] if isinstance(c, int) and c not in given else c for c in main.constants]
        seconds = {"passes": middle, self.options.target: time.perf_counter() - start - middle}
        self._report(lowered, main, arguments, weights, seconds)
        return Binding(function, constants, lowered.layers)

    def _engine(self, traced: Traced, lowered: Lowered, arguments: Sequence[Any]) -> Callable[..., Any]:
        """An engine, which holds the weights: for others there is another."""
        from qcompile.torch_tensorrt import compile_module

        return compile_module(lowered.gm, [arguments[i] for i in traced.inputs])

    def _report(
        self,
        lowered: Lowered,
        main: Main,
        arguments: Sequence[Any],
        weights: Mapping[str, torch.Tensor],
        seconds: Mapping[str, float],
    ) -> None:
        """Add a report if the function is new, or if its layers have other names with these weights."""
        key = hash((main.structure, frozenset(lowered.layers.items())))
        if key not in self._reported:
            report = report_of(lowered, main, self.options, _device(arguments), seconds)
            self.reports.append(Reported(report))
            self._reported[key] = self.reports[-1]
            _log(report)
        self._reported[key].add(weights.values())

    def _compile(self, main: Main) -> Callable[..., Any]:
        if self.options.target == "eager":
            function: Callable[..., Any] = main.gm.forward
            return function
        return compile_inductor(main.gm, main.fakes, self.captured.fake_mode, self.options)


def _naming(traced: Traced, arguments: Sequence[Any]) -> Naming:
    """What weights and modules are called in the model that is called now."""
    weights = {name: arguments[index] for name, index in traced.weights.items()}
    call = current_call()
    return Naming.of(traced.roots, weights, owners(call.modules()) if call is not None else {})


def _log(report: CompileReport) -> None:
    """Say in one line each what a user might not expect: what the device has no kernel for, a model left as it is."""
    if not report.recipe and report.unquantized and not report.quantized:
        logger.warning(
            "no recipe, and nothing in this graph is quantized: %d layers are compiled as they are; pass"
            " options={'recipe': ...}, or mode= as one of its options",
            len(report.unquantized),
        )
    for why, count in Counter(report.dropped.values()).items():
        logger.warning("%d layers run in the precision of the model: %s; qcompile.explain lists them", count, why)


def _wanted(gm: GraphModule) -> list[bool]:
    """For each result of Dynamo's graph, whether autograd would give it a gradient."""
    values = [r.meta.get("example_value") if isinstance(r, Node) else r for r in gm.graph.output_node().args[0]]  # type: ignore[union-attr]
    return [isinstance(value, torch.Tensor) and value.requires_grad for value in values]


def _device(arguments: Sequence[Any]) -> Device:
    """The kind of device that the graph runs on: that of its first tensor that is not a number on the CPU."""
    devices = [a.device for a in arguments if isinstance(a, torch.Tensor)]
    on_gpu = [device for device in devices if device.type != "cpu"]
    return Device.of((on_gpu or devices or [torch.device("cpu")])[0])


install(qcompile_backend)
