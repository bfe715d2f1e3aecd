"""A pass that crashes is named, with the module and the node that it was at; what it says on purpose stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.base import Pass, run_pipeline
from passes.errors import PassError, QCompileError
from passes.graph import aten, calls, val
from passes.testing import graph_of
from tests.passes.support import Mlp

X = torch.randn(2, 8)


class Crashes(Pass):
    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.linear.default):
            self.look_at(node)

    def look_at(self, linear: Node) -> None:
        if "down" in str(linear.args[1]):
            del linear.meta["val"]
            val(linear)


class CrashesLater(Pass):
    """Leaves a graph that torch.fx refuses."""

    def rewrite(self, gm: GraphModule) -> None:
        (first, *_) = calls(gm.graph, aten.linear.default)
        gm.graph.output_node().append(first)
        self.fire()


class CrashesAtOnce(Pass):
    def rewrite(self, gm: GraphModule) -> None:
        raise ZeroDivisionError


class Custom(QCompileError):
    pass


class Refuses(Pass):
    def rewrite(self, gm: GraphModule) -> None:
        raise Custom("up: on purpose")


def test_a_crash_names_the_pass_the_module_and_the_node() -> None:
    with pytest.raises(PassError, match=r"^Crashes failed at down \(node linear_1\): KeyError: 'val'$") as caught:
        run_pipeline((Crashes,), graph_of(Mlp(), X))
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_the_graph_says_of_itself_names_the_pass() -> None:
    with pytest.raises(PassError, match=r"^CrashesLater failed.*RuntimeError"):
        CrashesLater()(graph_of(Mlp(), X))


def test_where_no_node_is_known_the_pass_is() -> None:
    with pytest.raises(PassError, match=r"^CrashesAtOnce failed: ZeroDivisionError$"):
        CrashesAtOnce()(graph_of(Mlp(), X))


def test_an_error_on_purpose_passes_through() -> None:
    with pytest.raises(Custom, match=r"^up: on purpose$"):
        run_pipeline((Refuses,), graph_of(Mlp(), X))


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class CrashesAtRoot(Pass):
    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.relu.default):
            raise IndexError(f"no operand 7 of {node.name}\nand more")


def test_a_node_of_the_root_is_called_by_its_name() -> None:
    with pytest.raises(PassError, match=r"^CrashesAtRoot failed at node relu: IndexError: no operand 7 of relu$"):
        CrashesAtRoot()(graph_of(Root(), X))
