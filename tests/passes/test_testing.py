"""`passes.testing` finds what is wrong with a pass, and says it with the graph."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes import testing
from passes.base import Pass
from passes.graph import Emitter, aten, calls, shape
from passes.testing import DYNAMIC, declines, graph_of, graph_text, rewrites

X = torch.arange(6.0).reshape(2, 3)


class Negations(Pass):
    """`neg(relu(x))` becomes `mul(relu(x), -1)`; `fault` makes it wrong in one way."""

    def __init__(self, fault: Callable[[GraphModule, Node], object] | None = None) -> None:
        super().__init__()
        self.fault = fault

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.neg.default):
            if self.fault is not None and self.fault(gm, node) == "as it is":
                continue
            if any(user.op != "output" for user in node.users):
                self.decline("something else reads it", node)
                continue
            node.replace_all_uses_with(Emitter(node)(aten.mul.Tensor, node.args[0], -1))
            self.fire()


def negated(x: Tensor) -> Tensor:
    return -x.relu()


BEFORE = """
    x: f32[2, 3]
    relu = relu(x): f32[2, 3]
    neg = neg(relu): f32[2, 3]
    return neg
"""
AFTER = """
    x: f32[2, 3]
    relu = relu(x): f32[2, 3]
    mul = mul.Tensor(relu, -1): f32[2, 3]
    return mul
"""


def test_a_pass_that_does_what_it_says() -> None:
    log = rewrites(Negations, negated, X, before=BEFORE, after=AFTER, second_user=True, dynamic={"x": (0, 1)})
    assert log.fired == {"Negations": 1}
    rewrites(Negations, nn.Sequential(nn.Linear(3, 3)).append(nn.Identity()), X, fired=0)
    assert declines(Negations, lambda x: (-x).exp(), X, reason="something else") == ["something else reads it"]
    assert len(declines(Negations, lambda x: (-x).exp().neg().exp(), X, second_user=aten.exp.default)) == 2


def without_meta(gm: GraphModule, node: Node) -> str:
    with gm.graph.inserting_before(node):
        node.replace_all_uses_with(gm.graph.call_function(aten.mul.Tensor, (node.args[0], -1)))
    return "fired"


def wrong_dtype(gm: GraphModule, node: Node) -> None:
    node.args[0].meta["val"] = node.args[0].meta["val"].half()  # type: ignore[union-attr]


def cut_off(gm: GraphModule, node: Node) -> None:
    (output,) = node.users
    output.args = ((Emitter(node)(aten.full.default, [2, 3], 0.0),),)


def grow(gm: GraphModule, node: Node) -> None:
    node.replace_input_with(node.args[0], Emitter(node)(aten.relu.default, node.args[0]))  # type: ignore[arg-type]


def first_size(gm: GraphModule, node: Node) -> object:
    return None if isinstance(shape(node)[0], int) else "as it is"


def all_users(gm: GraphModule, node: Node) -> None:
    """Adds one to what it reads, everywhere but on the way to `node`."""
    relu: Any = node.args[0]
    more = Emitter(node)(aten.add.Tensor, relu, 1)
    relu.replace_all_uses_with(more, delete_user_cb=lambda user: user not in (more, node))


def more_outputs(gm: GraphModule, node: Node) -> None:
    gm.graph.output_node().args = ((*gm.graph.output_node().args[0], node.args[0]),)  # type: ignore[misc]


FAULTS: dict[str, tuple[Callable[[GraphModule, Node], object], dict[str, Any], str]] = {
    "no metadata": (
        without_meta,
        {},
        r"node mul\w* has no meta\['val'\] and meta\['nn_module_stack'\].*Emitter.*neg",
    ),
    "wrong metadata": (wrong_dtype, {}, r"output 0 was torch.float32 of 2 axes, and is torch.float16"),
    "an input is lost": (cut_off, {}, r"Negations.*output 0 no longer depends on x"),
    "another text": (lambda gm, node: None, {"after": BEFORE}, r"the graph after is another one:.*-neg = .*\+mul = "),
    "another count": (lambda gm, node: None, {"fired": 2}, r"fired 1 times instead of 2 .*-neg.*\+mul"),
    "dynamic": (first_size, {"dynamic": {"x": 0}}, r"fired 0 times instead of 1 where sizes are dynamic"),
    "a second user": (all_users, {"second_user": True}, r"Negations changes values where relu\w* has a second user"),
    "outputs": (more_outputs, {}, r"there were 1 outputs, and are 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_told(fault: str) -> None:
    make, options, told = FAULTS[fault]
    with pytest.raises(AssertionError) as caught:
        rewrites(partial(Negations, make), negated, X, **options)
    assert re.search(told, str(caught.value), re.DOTALL), caught.value
    assert "relu" in str(caught.value)


class Grows(Pass):
    """One more `relu` at each run."""

    def rewrite(self, gm: GraphModule) -> None:
        for node in list(calls(gm.graph, aten.relu.default))[:1]:
            grow(gm, node)
            self.fire()


def test_a_second_run_changes_nothing() -> None:
    with pytest.raises(AssertionError, match=r"a second run of Grows changes the graph(?s:.*)\n\+.*relu"):
        rewrites(Grows, negated, X)


def test_what_had_to_decline() -> None:
    with pytest.raises(AssertionError, match=r"Negations fired, and had to decline:(?s:.*)-neg(?s:.*)\+mul"):
        declines(Negations, negated, X)
    with pytest.raises(AssertionError, match=r"no reason matches 'loud'; it said\nsomething else reads it\nof\nx: f32"):
        declines(Negations, lambda x: (-x).exp(), X, reason="loud")
    with pytest.raises(AssertionError, match=r"says that it changed nothing, and changed(?s:.*)\+.*relu_"):
        declines(partial(Negations, lambda gm, n: (grow(gm, n), "as it is")[1]), negated, X)


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(TypeError, match="no argument is called y; there are x"):
        rewrites(Negations, negated, X, dynamic={"y": 0})
    with pytest.raises(TypeError, match="a graph is captured already"):
        rewrites(Negations, graph_of(negated, X), X, dynamic={"x": 0})
    with pytest.raises(AssertionError, match="nothing in between"):
        rewrites(Negations, lambda x: -x, X, second_user=True)
    with pytest.raises(AssertionError, match=r"2 calls of aten.neg.default in\nx: "):
        testing.only_call(graph_of(lambda x: (-x, -x), X), aten.neg.default)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, int, Tensor]:
        y = torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: self.fc(x) * 2, (x,))
        return y.exp(), x.shape[0] * 2, x @ x.transpose(0, 1)


def test_a_graph_as_text() -> None:
    """Sizes, constants, several outputs, graphs in calls; the normal form; names that messages use."""
    gm = graph_of(Model(), X, dynamic={0: 0})
    assert graph_text(gm, stable=True) == (
        "x: f32[s0, 3]\n"
        "sym_size = sym_size.int(x, 0): s0\n"
        "sum = sum(x): f32[]\n"
        "gt = gt.Scalar(sum, 0): bool[]\n"
        "cond = cond(gt, true_graph_0, false_graph_0, (x,)): (f32[s0, 4])\n"
        "getitem = cond[0]: f32[s0, 4]\n"
        "exp = exp(getitem): f32[s0, 4]\n"
        "mul = mul(sym_size, 2): 2*s0\n"
        "transpose = transpose.int(x, 0, 1): f32[3, s0]\n"
        "matmul = matmul(x, transpose): f32[s0, s0]\n"
        "return exp, mul, matmul\n"
        "true_graph_0 of cond:\n"
        "    x: f32[s0, 3]\n"
        "    fc.bias = constant: f32[4]\n"
        "    fc.weight = constant: f32[4, 3]\n"
        "    linear = linear(x, fc.weight, fc.bias): f32[s0, 4]\n"
        "    return linear\n"
        "false_graph_0 of cond:\n"
        "    x: f32[s0, 3]\n"
        "    fc.bias = constant: f32[4]\n"
        "    fc.weight = constant: f32[4, 3]\n"
        "    linear = linear(x, fc.weight, fc.bias): f32[s0, 4]\n"
        "    mul = mul.Tensor(linear, 2): f32[s0, 4]\n"
        "    return mul"
    )
    text = graph_text(graph_of(nn.Sequential(nn.Linear(3, 4)), X, dynamic_shapes=({0: DYNAMIC},)))
    assert re.search(r"linear = linear\(input_?\w*, \w*0_weight, \w*0_bias\): f32\[s\d+, 4\]  # 0\n", text), text
    normal = graph_text(graph_of(lambda x: x.view(3, 2).clone() + 1, X, normalized=True), stable=True)
    assert "reshape" in normal and "clone" not in normal
