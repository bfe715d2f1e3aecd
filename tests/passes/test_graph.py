"""The helpers that read and edit FX graphs, and what a pass and a pipeline record."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.base import Pass, PassLog, run_pipeline
from passes.constants import (
    add_constant,
    constant,
    constant_before,
    delete_constant,
    evaluate_constant,
    is_constant_expression,
    replace_with_constant,
    root_constants,
)
from passes.graph import (
    Emitter,
    argument,
    aten,
    calls,
    is_call,
    module_class,
    module_path,
    module_stack,
    only_user,
    shape,
    strip,
)
from tests.passes.support import DYNAMIC, Attention, Mlp, count, graph_of, only_call, run


class TiedLayout(nn.Module):
    """One parameter read as it is, and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) @ self.table.weight.t()


def first(gm: GraphModule, op: str) -> Node:
    return next(iter(gm.graph.find_nodes(op=op)))


def test_module_path_and_class_are_those_of_the_innermost_module() -> None:
    gm = graph_of(nn.Sequential(Mlp(), Mlp()), torch.randn(2, 8))
    paths = [module_path(node) for node in calls(gm.graph, aten.linear.default)]
    assert paths == ["0.up", "0.down", "1.up", "1.down"]
    linear = next(calls(gm.graph, aten.linear.default))
    assert module_class(linear) == "torch.nn.modules.linear.Linear"
    assert [path for path, _ in module_stack(linear)] == ["", "0", "0.up"]


@pytest.mark.parametrize(
    ("dynamo", "path"),
    [
        ("L['self'].layers.0.q_proj", "layers.0.q_proj"),
        ("L['self']", ""),
        ("L['self'].layers[0].q_proj", "layers.0.q_proj"),
        ("L['self']._modules['layers'].q", "_modules.layers.q"),
    ],
)
def test_paths_of_dynamo_are_normalized(dynamo: str, path: str) -> None:
    node = torch.fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"k": (dynamo, nn.Linear)}
    assert module_stack(node) == [(path, "torch.nn.modules.linear.Linear")]


def test_a_node_without_a_stack_belongs_to_the_top() -> None:
    node = torch.fx.Graph().placeholder("x")
    assert (module_path(node), module_class(node)) == ("", None)


def test_argument_finds_positional_keyword_and_default() -> None:
    gm = graph_of(Attention(scale=0.5), torch.randn(1, 3, 16))
    node = only_call(gm, aten.scaled_dot_product_attention.default)
    assert argument(node, "scale") == 0.5
    assert argument(node, "query") is node.args[0]
    assert argument(node, "dropout_p") == 0.0
    assert argument(node, "is_causal") is False
    assert argument(node, "no such argument", "default") == "default"


def test_only_user_and_strip() -> None:
    class Clones(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.relu().clone().detach()
            return y.sin(), y.cos()

    gm = graph_of(Clones(), torch.randn(2))
    sin = only_call(gm, aten.sin.default)
    source = sin.args[0]
    assert isinstance(source, Node)
    assert only_user(source) is None
    assert only_user(sin) is first(gm, "output")
    assert is_call(strip(source), aten.relu.default)
    assert strip(sin, aten.sin.default) is source


def test_emitted_nodes_have_a_value_a_stack_and_dynamic_sizes() -> None:
    gm = graph_of(nn.Linear(4, 6), torch.randn(3, 4), dynamic_shapes=({0: DYNAMIC},))
    linear = only_call(gm, aten.linear.default)
    emit = Emitter(first(gm, "output"), like=linear)
    doubled = emit(aten.mul.Tensor, linear, 2.0)
    assert shape(doubled) == shape(linear)
    assert module_path(doubled) == module_path(linear)
    rows, columns = emit.sizes(doubled)
    assert isinstance(rows, Node)
    assert columns == 6
    flat = emit(aten.reshape.default, doubled, [rows, 2, 3])
    halves = emit(aten.split_with_sizes.default, flat, [1, 1], 1)
    part = emit.getitem(halves, 1)
    assert tuple(shape(part))[1:] == (1, 3)
    first(gm, "output").args = ((part,),)
    gm.recompile()
    x = torch.randn(5, 4)
    weight, bias = gm.get_parameter("weight"), gm.get_parameter("bias")
    torch.testing.assert_close(run(gm, x)[0], (2 * nn.functional.linear(x, weight, bias)).view(5, 2, 3)[:, 1:])


def test_emitted_nodes_keep_the_annotations_of_what_they_replace() -> None:
    gm = graph_of(Mlp(), torch.randn(2, 8))
    relu = only_call(gm, aten.relu.default)
    relu.meta["custom"] = {"note": 1}
    new = Emitter(relu)(aten.neg.default, relu.args[0])
    assert new.meta["custom"] == {"note": 1}
    assert new.meta["custom"] is not relu.meta["custom"]


# --- constants -----------------------------------------------------------------------------------------------------


def test_constants_are_added_under_free_names_and_deleted() -> None:
    gm = graph_of(Mlp(), torch.randn(2, 8))
    before = first(gm, "output")
    names = [str(add_constant(gm, "up.input_scale", torch.tensor(float(i)), before).target) for i in range(3)]
    assert names == ["up.input_scale", "up.input_scale_1", "up.input_scale_2"]
    assert [name for name, _ in gm.named_buffers()] == names
    node = add_constant(gm, "new.module.codes", nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn), False), before)
    assert node.meta["val"].dtype is torch.float8_e4m3fn
    assert "new.module.codes" in dict(gm.named_parameters())
    delete_constant(gm, "up.input_scale_1")
    assert len(list(gm.buffers())) == 2


def test_a_copy_of_a_constant_reads_the_same_tensor_earlier() -> None:
    gm = graph_of(nn.Linear(4, 6), torch.randn(3, 4))
    linear = only_call(gm, aten.linear.default)
    weight = linear.args[1]
    copy = constant_before(weight, gm.graph.find_nodes(op="get_attr")[0])
    assert copy < weight
    assert constant(gm, copy) is constant(gm, weight)
    assert constant(gm, linear) is None
    assert constant(gm, None) is None


def test_constant_expressions_are_layouts_of_weights() -> None:
    gm = graph_of(TiedLayout(), torch.arange(3))
    transpose = only_call(gm, aten.t.default) if count(gm, aten.t.default) else only_call(gm, aten.transpose.int)
    assert is_constant_expression(transpose)
    assert not is_constant_expression(only_call(gm, aten.embedding.default))
    assert not is_constant_expression(first(gm, "placeholder"))
    assert not is_constant_expression(3)
    assert [str(root.target) for root in root_constants(transpose)] == ["table.weight"]
    assert torch.equal(evaluate_constant(gm, transpose), gm.get_parameter("table.weight").t())


def test_a_replaced_constant_keeps_its_name_only_if_nothing_else_reads_it() -> None:
    gm = graph_of(TiedLayout(), torch.arange(3))
    expected = run(gm, torch.arange(3))
    (transpose,) = calls(gm.graph, aten.t.default, aten.transpose.int, aten.permute.default)
    replace_with_constant(gm, transpose, evaluate_constant(gm, transpose).contiguous())
    gm.recompile()
    assert {name: tuple(p.shape) for name, p in gm.named_parameters()} == {
        "table.weight": (7, 4),
        "table.weight_1": (4, 7),
    }
    torch.testing.assert_close(run(gm, torch.arange(3)), expected)  # BLAS adds up in another order


def test_a_name_below_a_tensor_is_taken_by_another() -> None:
    """A parameter `proj` beside `proj_weight`: scales of the layer `proj` cannot be stored below it."""
    gm = graph_of(Mlp(), torch.randn(2, 8))
    gm.register_buffer("proj", torch.ones(1))
    node = add_constant(gm, "proj.input_scale", torch.tensor(2.0), first(gm, "output"))
    assert constant(gm, node) == 2.0


# --- the base class ------------------------------------------------------------------------------------------------


class ReluToNeg(Pass):
    """Replaces relu; declines everything else that it is told about."""

    def __init__(self, declined: str = "") -> None:
        super().__init__()
        self.declined = declined

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.relu.default):
            if self.declined:
                self.decline(self.declined, node)
                continue
            node.replace_all_uses_with(Emitter(node)(aten.neg.default, node.args[0]))
            self.fire()


def test_a_pass_removes_dead_code_and_says_whether_it_changed_something() -> None:
    gm = graph_of(Mlp(), torch.randn(2, 8))
    assert ReluToNeg()(gm).modified
    assert count(gm, aten.relu.default) == 0
    assert "aten.neg" in gm.code
    assert not ReluToNeg()(gm).modified


def test_a_pipeline_shares_one_log_in_which_only_its_own_run_counts_as_a_change() -> None:
    gm = graph_of(nn.Sequential(Mlp(), Mlp()), torch.randn(2, 8))
    log = run_pipeline((partial(ReluToNeg, "not today"), ReluToNeg, ReluToNeg), gm)
    assert log.fired["ReluToNeg"] == 2
    assert [(d.pass_name, d.reason, d.module, d.nodes) for d in log.declined] == [
        ("ReluToNeg", "not today", "0", ("relu",)),
        ("ReluToNeg", "not today", "1", ("relu_1",)),
    ]
    again = ReluToNeg()
    again.log = log
    assert not again(gm).modified
    assert run_pipeline((), gm, log) is log
    assert PassLog().declined == []
