"""What a pass says it did, and what a pipeline makes of it."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from passes.base import Decline, Pass, PassLog, run_pipeline
from passes.errors import PassError
from passes.graph import Emitter, aten, calls
from passes.promises import checked
from passes.testing import blank, count, returns


class Doubles(Pass):
    """`x + 1` becomes `x * 2`; an addition of anything else is declined."""

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.add.Tensor):
            if node.args[1] != 1:
                self.decline("adds something else", node, node.args[0])  # type: ignore[arg-type]
                continue
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(aten.mul.Tensor, (node.args[0], 2))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            self.fire()


class Silent(Pass):
    """Changes the graph and does not say so."""

    def rewrite(self, gm: GraphModule) -> None:
        gm.graph.output_node().args = ((),)


def graph(*addends: int) -> GraphModule:
    gm, emit, (x,) = blank(torch.ones(2))
    emit.before.meta["nn_module_stack"] = {"m": ("layers.0", "torch.nn.Linear")}
    return returns(gm, *(emit(aten.add.Tensor, x, addend) for addend in addends))


def test_a_pass_counts_what_it_changed_and_what_it_left() -> None:
    gm = graph(1, 3, 1)
    instance = Doubles()
    result = instance(gm)
    assert result.modified and result.graph_module is gm
    assert instance.log.fired == {"Doubles": 2}
    assert instance.log.declined == [Decline("Doubles", "adds something else", "layers.0", ("add_tensor_1", "x0"))]
    assert (count(gm, aten.add.Tensor), count(gm, aten.mul.Tensor)) == (1, 2)  # what became dead is gone
    assert [float(y[0]) for y in gm(torch.ones(2))] == [2.0, 4.0, 2.0] and "mul" in gm.code
    again = instance(gm)
    assert not again.modified and instance.log.fired == {"Doubles": 2}


def test_a_pass_that_does_not_fire_has_not_modified() -> None:
    gm = graph(1)
    code = gm.code
    assert not Silent()(gm).modified
    assert gm.code == code


def test_a_pipeline_shares_one_log_and_writes_the_code_once() -> None:
    gm, log = graph(1, 3), PassLog()
    log.fired["Before"] = 5
    assert run_pipeline((Doubles, Silent), gm, log) is log
    assert log.fired == {"Before": 5, "Doubles": 1} and len(log.declined) == 1
    assert gm(torch.ones(2)) == ()
    fresh = run_pipeline((Doubles,), graph(1, 1))
    assert fresh.fired == {"Doubles": 2} and fresh.declined == []


def test_code_that_is_not_wanted_is_not_written() -> None:
    gm = graph(1)
    run_pipeline((Doubles,), gm, recompile=False)
    assert "mul" not in gm.code and count(gm, aten.mul.Tensor) == 1
    gm, log = graph(3), PassLog()
    log.fired["Doubles"] = 1
    gm.graph.output_node().args = ((),)
    run_pipeline((Doubles,), gm, log)  # nothing fired now
    assert "add" in gm.code


class CutsOff(Pass):
    """Says what it did, and puts a constant in the place of a value."""

    def rewrite(self, gm: GraphModule) -> None:
        (result,) = gm.graph.output_node().args[0]  # type: ignore[misc]
        zeros = Emitter(result)(aten.full.default, [2], 0.0)  # type: ignore[arg-type]
        gm.graph.output_node().args = ((zeros,),)
        self.fire()


class Demands(Doubles):
    """Wants what is not there, and leaves what it says to clear."""

    clears = (aten.add.Tensor,)

    def check_requires(self, gm: GraphModule) -> list[str]:
        return ["there is no gate", "and no door"] if not count(gm, aten.neg.default) else []


def test_a_pass_that_breaks_a_promise_is_named_where_somebody_checks() -> None:
    silent, cut = (Silent, r"Silent: .*changed the graph and did not say so"), (CutsOff, "output 0 no longer depends")
    for made, told in (silent, cut, (Demands, r"Demands: it requires.*there is no gate \(and 1 more\)")):
        run_pipeline((made,), graph(1))
        with checked(), pytest.raises(PassError, match=told):
            run_pipeline((made,), graph(1))
    gm, emit, (x,) = blank(torch.ones(2))
    returns(gm, emit(aten.neg.default, x), emit(aten.add.Tensor, x, x))
    gm.graph.output_node().args = ((*gm.graph.output_node().args[0], emit(aten.add.Tensor, x, 1)),)  # type: ignore[misc]
    with checked():
        run_pipeline((Demands,), gm)  # what is left was declined
        with pytest.raises(PassError, match=r"aten.neg.default is left at neg"):
            Left = type("Left", (Doubles,), {"clears": (aten.neg.default,)})
            run_pipeline((Left,), gm)
