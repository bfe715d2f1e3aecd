"""Passes go into a pipeline at a named place, and through it into whole runs."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, get_args

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
from passes.pipelines import NORMALIZE, TENSORRT, Route, route
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


class Doubles(Pass):
    """Writes to the weights of the graph themselves."""

    def __init__(self, fires: bool, how: str) -> None:
        super().__init__()
        self.fires, self.how = fires, how

    def rewrite(self, gm: GraphModule) -> None:
        for weight in gm.parameters():
            if self.how == "swap":
                weight.data[:2] = weight.data[:2].flip(0).clone()
            else:
                (weight.data if self.how == "data" else weight.detach()).mul_(2)
            self.fire(self.fires)


class Wide(Pass):
    """The results of `relu` in another dtype (`how` "dtype") or shape, and those that read them as before."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.relu.default):
            emit = Emitter(node)
            wide = {"dtype": torch.float64} if self.how == "dtype" else {}
            found = emit(aten._to_copy.default, node.args[0], **wide)
            if self.how == "shape":
                found = emit(aten.slice.Tensor, found, 0, 0, 2)
            if self.how == "copied":  # a habit: the metadata of the old node, for a call that makes another dtype
                found = emit(aten._to_copy.default, node.args[0], dtype=torch.float64)
                found.meta = dict(node.meta)
            node.replace_all_uses_with(found)
            self.fire()


class Needs(Clamped):
    """One that needs an argument."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)


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


PAGE = (Path(__file__).parents[2] / "docs" / "passes-of-your-own.md").read_text(encoding="utf-8")


def test_the_page_of_own_passes_is_true() -> None:
    """Its pass, its test and its places run; its table of stages is that of the routes."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    told: dict[str, Any] = {"Other": Clamped}
    for block in (*blocks[:2], "from functools import partial\n" + blocks[2].partition("\n")[0]):
        exec(block, told)  # the page's own code
    OwnPasses(told["own"], route("quantize"))
    table = dict(re.findall(r"^\| `(\S+)` \| (.*) \|$", PAGE, re.MULTILINE))
    entries = {
        "quantize": "quantize",
        "import": "import_quantized",
        "tensorrt": 'export_onnx(target="tensorrt")',
        "portable": 'export_onnx(target="portable")',
    }
    stages = {name: list(dict.fromkeys(stage_of(class_of(make)) for make in route(name))) for name in get_args(Route)}
    for name, entry in entries.items():
        assert table.pop(entry).split(", ") == stages[name], entry
    assert list(table) == ["torch.compile"]
    assert set(stages["compile"]) == {*stages["quantize"], *stages["import"], "lower"}


def test_passes_go_where_other_own_passes_are() -> None:
    own = OwnPasses([before("Clamped", Second), after(Needs, Doubles2 := type("Doubles2", (Second,), {})),
                     after("normalize", Clamped, partial(Needs, 3))], route("quantize"))  # fmt: skip
    assert names(own.into(NORMALIZE))[-4:] == ["Second", "Clamped", "Needs", Doubles2.__name__]
    own.check_placed()
    assert names(OwnPasses(after("normalize", Clamped)).into(NORMALIZE))[-1] == "Clamped"
    with pytest.raises(PassError, match=r"after\('Clamped', Clamped\): no such place here; stages: canonicalize"):
        OwnPasses([after("Clamped", Clamped)], route("import"))


@pytest.mark.parametrize(
    ("place", "given", "told"),
    [
        ("fuse", (dict,), "dict is no pass: give a subclass of passes.Pass"),
        ("fuse", (lambda: None,), "is no pass: give a subclass of passes.Pass"),
        ("fuse", (Pass,), "Pass has no rewrite of its own"),
        (3, (Clamped,), r"after\(3, ...\): a place is a stage, or the name or class of a pass"),
        ("fuse", (), r"after\('fuse'\) places nothing"),
        ("fuse", (partial(Clamped, 1.0, "", 3),), "Clamped cannot be made of what is given here: too many positional"),
        ("fuse", (partial(Clamped, no=3),), "Clamped cannot be made of what is given here: .*no"),
        ("fuse", (Needs,), "Needs cannot be made of what is given here: missing a required argument: 'needed'"),
    ],
)
def test_what_cannot_be_placed_says_so(place: Any, given: tuple[Any, ...], told: str) -> None:
    for put in (after, NORMALIZE.after):
        with pytest.raises(PassError, match=told):
            put(place, *given)


@pytest.mark.parametrize("given", [3, "fuse", [Clamped]])
def test_what_is_not_placed_says_so(given: Any) -> None:
    told = "passes= takes what passes.after and passes.before make, not"
    with pytest.raises(PassError, match=told):
        qcompile.quantize(Mlp(), (X,), passes=given)
    with pytest.raises(PassError, match=told):
        qcompile.import_quantized(Mlp(), (X,), passes=given)
    with pytest.raises(PassError, match=told):
        torch.compile(Mlp(), backend="qcompile", options={"passes": given})


@pytest.mark.parametrize("how", ["data", "detach", "swap"])
@pytest.mark.parametrize("fires", [True, False])
def test_an_own_pass_that_writes_to_the_model_is_named(fires: bool, how: str) -> None:
    own = after("normalize", partial(Doubles, fires, how))
    told = r"Doubles: it broke a promise: it wrote to .*(up|down)\.weight.* in place, and so to the model itself"
    with pytest.raises(PassError, match=told):
        qcompile.quantize(Mlp().eval(), (X,), calibration=[(X,)], progress=False, passes=own)


@pytest.mark.parametrize("how", ["dtype", "shape", "copied"])
def test_an_own_pass_that_leaves_stale_metadata_is_named(how: str) -> None:
    told = "now, and its meta|cannot be computed from what it reads now"
    with pytest.raises(PassError, match=rf"Wide: it broke a promise: (linear\w* of down|_to_copy\w*) .*({told})"):
        qcompile.quantize(
            Mlp().eval(), (X,), calibration=[(X,)], progress=False, passes=after("normalize", partial(Wide, how))
        )


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
    again = qcompile.import_quantized(plain, passes=after("normalize", partial(Clamped, 0.5)), progress=False)
    assert [n.args[1:] for n in calls(again.graph, aten.clamp.default)] == [(0, 0.5)]
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
