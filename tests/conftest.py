"""Settings that all tests share."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch._export import utils as export_utils
from torch.export import ExportedProgram, exported_program
from torch.fx import GraphModule
from torch.onnx._internal.exporter._registration import ONNXRegistry

from passes import checked

# Compiling and exporting inside an example makes its first run slow, which says nothing about the code under test.
settings.register_profile("qcompile", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("qcompile")

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it does


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.everyday(n)`: n of a test's parameter sets, from the first to the last, run every day."""
    families: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("everyday") and not item.get_closest_marker("slow"):
            families[item.nodeid.partition("[")[0]].append(item)
    for family in families.values():
        (count,) = family[0].get_closest_marker("everyday").args  # type: ignore[union-attr]
        last = len(family) - 1
        kept = {round(index * last / max(count - 1, 1)) for index in range(count)}
        for index, item in enumerate(family):
            if index not in kept:
                item.add_marker("slow")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _promises(request: pytest.FixtureRequest) -> Iterator[None]:
    """In whole routes each pass is held to what it promises."""
    whole = {"e2e", "fuzz"} & {*request.path.parts}
    with checked() if whole else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def _once() -> Iterator[None]:
    """What torch does at each export, longer than a tiny model takes, is done once here, or not: torch.onnx parses its
    500 functions, and torch.export looks up all operators that are made of others, and overrides each of them to make a
    program functional; those that the program has are enough."""
    parsed = functools.cache(ONNXRegistry.from_torchlib)

    def registry(**opset: int) -> Any:
        fresh = copy.copy(parsed(**opset))
        fresh.functions = {target: list(known) for target, known in fresh.functions.items()}
        return fresh

    decompose = exported_program._decompose_exported_program

    def functional(program: ExportedProgram, *, cia_to_decomp: Any, python_decomp_table: Any, **options: Any) -> Any:
        if not python_decomp_table:  # nothing is decomposed, so that no other operator can arise
            parts = [part for part in program.graph_module.modules() if isinstance(part, GraphModule)]
            used = {node.target for part in parts for node in part.graph.nodes if node.op == "call_function"}
            cia_to_decomp = {op: kept for op, kept in cia_to_decomp.items() if op in used}
        return decompose(program, cia_to_decomp=cia_to_decomp, python_decomp_table=python_decomp_table, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported_program, "_decompose_exported_program", functional)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(registry))
        patch.setattr(export_utils, "_materialize_cpp_cia_ops", functools.cache(export_utils._materialize_cpp_cia_ops))
        yield
