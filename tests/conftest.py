"""Settings that all tests share."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch._export import utils as export_utils
from torch.export import ExportedProgram, exported_program
from torch.fx import GraphModule
from torch.onnx._internal.exporter._registration import ONNXRegistry

from passes import checked

# Compiling and exporting inside an example makes it slow, which says nothing about the code under test.
# `everyday` tries the same examples each time; `find`, of `.ci/find`, others, and first those that failed before.
_COMMON: dict[str, Any] = {"deadline": None, "print_blob": True}
settings.register_profile("everyday", **_COMMON, max_examples=30, derandomize=True)
settings.register_profile("find", **_COMMON, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("everyday")

torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it does


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    families: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        families[item.nodeid.partition("[")[0]].append(item)
    for family in families.values():
        _everyday([item for item in family if item.get_closest_marker("everyday")])
        # an attribute, which older releases have, too
        is_property = getattr(getattr(family[0], "obj", None), "is_hypothesis_test", False)
        if config.getoption("--hypothesis-profile") == "find" and is_property:
            _find(family)


def pytest_collection_finish() -> None:
    """A million objects of torch, transformers and modelopt are there for good: to walk them was a tenth of the run."""
    gc.collect()
    gc.freeze()


def _everyday(family: list[pytest.Item]) -> None:
    """`@pytest.mark.everyday(n)`: n of a test's parameter sets, from the first to the last, run every day."""
    family = [item for item in family if not item.get_closest_marker("slow")]
    if not family:
        return
    (count,) = family[0].get_closest_marker("everyday").args  # type: ignore[union-attr]
    last = len(family) - 1
    kept = {round(index * last / max(count - 1, 1)) for index in range(count)}
    for index, item in enumerate(family):
        if index not in kept:
            item.add_marker("slow")


def _find(family: list[pytest.Item]) -> None:
    """A test, over all of its parameter sets, gets the examples of the profile, and not those that it allows itself.

    The attribute is hypothesis' own; no public one reaches a test that has settings already.
    """
    test = family[0].obj  # type: ignore[attr-defined]
    own, wanted = test._hypothesis_internal_use_settings, settings.get_profile("find").max_examples
    for_each = math.ceil(wanted / len(family))
    test._hypothesis_internal_use_settings = settings(own, max_examples=max(own.max_examples, for_each))


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
