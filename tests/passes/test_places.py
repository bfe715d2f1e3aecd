"""Passes go into a pipeline at a named place, and through it into whole runs."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch.fx import GraphModule

import qcompile
from passes import after, before
from passes.base import Pass, PassLog, run_pipeline
from passes.catalogue import catalogue
from passes.errors import PassError
from passes.graph import Emitter, aten, calls
from passes.pipelines import NORMALIZE, TENSORRT, route
from passes.places import OwnPasses, Pipeline, class_of, stage_of
from tests.passes.support import Mlp

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Clamped(Pass):
    """`relu(x)` becomes `clamp(x, 0, most)`."""

    def __init__(self, most: float = 6.0, fault: str = "") -> None:
        super().__init__()
        self.most, self.fault = most, fault

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.relu.default):
            if self.fault == "raises":
                raise KeyError("nothing there")
            emit = Emitter(node)
            found: Any = emit(aten.clamp.default, node.args[0], 0, self.most)
            if self.fault == "cuts off":
                found = emit(aten.full.default, [4, 8], 1.0)
                gm.graph.output_node().args = ((found,),)
            if self.fault == "no meta":
                found.meta = {}
            node.replace_all_uses_with(found)
            self.fire()


class Second(Clamped):
    """Another one."""


def names(pipeline: tuple[Any, ...]) -> list[str]:
    return [class_of(make).__name__ for make in pipeline]


def test_a_pipeline_is_a_tuple_and_takes_passes_at_places() -> None:
    assert isinstance(NORMALIZE, tuple) and (*NORMALIZE,) == NORMALIZE and names(NORMALIZE)[0] == "ViewsToReshape"
    found = names(NORMALIZE.after("NormalizeLinear", Clamped, Second))
    at = found.index("NormalizeLinear")
    assert found[at + 1 : at + 3] == ["Clamped", "Second"] and len(found) == len(NORMALIZE) + 2
    assert names(NORMALIZE.before("normalize", partial(Clamped, 3.0)))[0] == "Clamped"
    assert names(NORMALIZE.after("normalize", Clamped))[-1] == "Clamped"
    twice = NORMALIZE.after("normalize", Clamped).after("normalize", Second).before(Second, Clamped)
    assert names(twice)[-3:] == ["Clamped", "Clamped", "Second"]
    last = names(TENSORRT.after("FoldConstants", Clamped))
    assert last[last.index("Clamped") - 1] == "FoldConstants"
    with pytest.raises(
        PassError, match=r"after\('fuze', Clamped\): no such place here; stages: normalize; passes: Views"
    ):
        NORMALIZE.after("fuze", Clamped)
    with pytest.raises(PassError, match=r"is no pass: give a subclass"):
        Pipeline(lambda: None).after("normalize", Second)


def test_own_passes_go_into_the_first_pipeline_with_their_place() -> None:
    own = OwnPasses([after("fold", Clamped), before("ViewsToReshape", Second)], route("quantize"))
    assert names(own.into(NORMALIZE))[:2] == ["Second", "ViewsToReshape"]
    with pytest.raises(PassError, match=r"after\('fold', Clamped\): no pipeline of this run had that place"):
        own.check_placed()
    assert names(own.into(TENSORRT))[-1] == "Clamped"
    own.check_placed()
    assert own.into(TENSORRT) == TENSORRT
    with pytest.raises(PassError, match=r"passes= takes what passes.after and passes.before make, not <class"):
        OwnPasses([Clamped])  # type: ignore[list-item]


def test_own_passes_are_checked_in_any_pipeline() -> None:
    from tests.passes.test_base import Silent, graph

    with pytest.raises(PassError, match="Silent: it broke a promise"):
        run_pipeline(NORMALIZE, graph(1), PassLog(own=OwnPasses([after("normalize", Silent)])))


def test_each_pass_comes_behind_those_that_it_requires() -> None:
    """ "Requires: `X` ran", held against every route that has both."""
    found = 0
    for name in ("quantize", "import", "tensorrt", "portable"):
        order = names(route(name))  # type: ignore[arg-type]
        before_them = [] if name in ("quantize", "import") else names(route("quantize"))
        for entry in catalogue():
            required = re.findall(r"`(\w+)`(?=[^.;]*\b(?:ran|made the node)\b)", entry.section("Requires"))
            for other in required:
                if entry.name in order and other in order:
                    assert order.index(other) < order.index(entry.name), (name, other, entry.name)
                    found += 1
                elif entry.name in order:
                    assert other in before_them or other in names(route("import")), (name, other, entry.name)
                    found += 1
    assert found > 20
    assert {stage_of(class_of(make)) for make in route("compile")} >= {"normalize", "quantize", "fold", "lower"}


@pytest.mark.parametrize("fault", ["raises", "cuts off", "no meta"])
def test_a_fault_in_an_own_pass_names_it(fault: str) -> None:
    told = {"raises": " failed.*nothing there", "cuts off": "no longer depends on x", "no meta": "Emitter"}
    own = [after("normalize", partial(Clamped, fault=fault))]
    with pytest.raises(PassError, match=f"Clamped.*{told[fault]}"):
        qcompile.quantize(Mlp().eval(), (X,), calibration=[(X,)], progress=False, passes=own)


def test_through_quantize_export_and_compile(tmp_path: Path) -> None:
    model = Mlp().eval()
    own = [after("NormalizeLinear", partial(Clamped, 0.125))]
    program = qcompile.quantize(model, (X,), calibration=[(X,)], progress=False, passes=own)
    assert [n.args[1:] for n in calls(program.graph, aten.clamp.default)] == [(0, 0.125)]
    plain = qcompile.quantize(model, (X,), calibration=[(X,)], progress=False)
    report = qcompile.export_onnx(plain, tmp_path / "m.onnx", passes=[before("legalize", Clamped)])
    assert report.fired["Clamped"] == 1 and "Min" in {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
    torch._dynamo.reset()
    options = {"recipe": "fp8_per_channel_per_token", "target": "eager", "passes": own}
    with torch.no_grad():
        got = torch.compile(model, backend="qcompile", options=options)(X)
        want = X + model.down(model.up(X).clamp(0, 0.125))
    assert (got - want).norm() < 0.1 * (want - X).norm()
    for call in (
        lambda: qcompile.quantize(model, (X,), passes=[after("nowhere", Clamped)]),
        lambda: qcompile.export_onnx(plain, tmp_path / "m.onnx", passes=[after("fuse", Clamped)]),
        lambda: torch.compile(model, backend="qcompile", options={"passes": [after("nowhere", Clamped)]}),
    ):
        with pytest.raises(PassError, match=r"Clamped\): no such place here; stages: .*fold"):
            call()
