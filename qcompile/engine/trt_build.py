"""Drives the TensorRT builder: fill a network, configure, build, turn what it says into one error or a layer list."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qcompile.engine.backend import Backend
from qcompile.engine.collector import undisturbed
from qcompile.engine.graph import OnnxGraph
from qcompile.engine.layer_list import parse_layers
from qcompile.engine.layers import Layer
from qcompile.engine.listeners import Step, Stop, logger, monitor
from qcompile.engine.messages import first, suspects, with_hint
from qcompile.engine.profiles import Profile, ShapeProfile, checked_profiles
from qcompile.errors import EngineError

Fill = Callable[[Any, Any], OnnxGraph]
"""Given an empty network and its logger, adds all layers and returns the graph that they carry out."""


@dataclass(frozen=True)
class Built:
    """A serialized engine (a buffer owned by TensorRT), its layer list, the shapes in its profiles, and its graph."""

    plan: Any
    layers: list[Layer]
    profiles: list[ShapeProfile]
    graph: OnnxGraph


def build(fill: Fill, backend: Backend, profiles: Profile | Sequence[Profile] | None, step: Step) -> Built:
    """Build one network. Raises EngineError with the node, its module path, the builder's reason and a hint."""
    with undisturbed():
        return _build(fill, backend, profiles, step)


def _build(fill: Fill, backend: Backend, profiles: Profile | Sequence[Profile] | None, step: Step) -> Built:
    trt = backend.trt
    log = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    step("Parsing", 0, 1)
    graph = fill(network, log)
    values = _values(network)
    found = checked_profiles(profiles, _inputs(network, graph), values)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    stop = Stop()
    config.progress_monitor = monitor(trt, step, stop)
    if backend.capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(backend.capability, 0)
    for shapes in found:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            put = profile.set_shape_input if name in values else profile.set_shape
            put(name, tuple(low), tuple(best), tuple(high))
        config.add_optimization_profile(profile)
    shaped: list[ShapeProfile] = [{name: s for name, s in profile.items() if name not in values} for profile in found]
    with stop.listening():
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = first(log.errors)
        concerned = suspects(graph, shaped) if "dedicated kernel" in reason else []
        raise EngineError(
            "\n  ".join([with_hint(f"the builder refused the file for sm{backend.target}: {reason}"), *concerned])
        )
    layers = parse_layers(log.layers or _inspect(trt, log, plan), max(1, len(shaped)))
    return Built(plan, layers, shaped, graph)


def parse_file(path: str | os.PathLike[str], graph: OnnxGraph, backend: Backend) -> Fill:
    """Fills a network with the ONNX file at `path`, of which `graph` is the index."""

    def fill(network: Any, log: Any) -> OnnxGraph:
        parser = backend.trt.OnnxParser(network, log)
        if not parser.parse_from_file(os.fspath(path)):
            raise _parse_error(parser, graph)
        return graph

    return fill


def _strongly_typed(trt: Any) -> int:
    """The types in the file are the types that run; newer builders know nothing else and have no flag for it."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _inputs(network: Any, graph: OnnxGraph) -> dict[str, list[int | str]]:
    """The network's inputs; a dynamic dimension is given the name that the file has for it."""
    names = {
        value.name: [d.dim_param or "?" for d in value.type.tensor_type.shape.dim] for value in graph.model.graph.input
    }
    inputs = (network.get_input(i) for i in range(network.num_inputs))
    return {
        t.name: [d if d >= 0 else names.get(t.name, ["?"] * len(t.shape))[axis] for axis, d in enumerate(t.shape)]
        for t in inputs
    }


def _values(network: Any) -> dict[str, int]:
    """The inputs whose values shapes depend on, such as the second input of a Reshape, and how many values each has."""
    inputs = (network.get_input(i) for i in range(network.num_inputs))
    return {t.name: math.prod(t.shape) for t in inputs if t.is_shape_tensor}


def _parse_error(parser: Any, graph: OnnxGraph) -> EngineError:
    error = parser.get_error(0)
    node = error.node_name()
    reason = first(error.desc().removeprefix(f"Invalid Node - {node}\n").splitlines())
    module = "" if graph.module(node) == node else f" in module {graph.module(node)!r}"
    where = f"{error.node_operator()} {node!r}{module}: " if node else ""
    return EngineError(with_hint(f"TensorRT cannot read the file: {where}{reason}"))


def _inspect(trt: Any, log: Any, plan: Any) -> str:
    """The layer list of a builder that does not log it: load the engine (this needs a GPU) and ask."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"the engine was built, but cannot be loaded to list its layers: {first(log.errors)}")
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))
