"""The helpers that read and edit FX graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.compat import FakeTensorMode, storage_id
from passes.formats import get_format
from passes.graph import (
    Emitter,
    argument,
    aten,
    calls,
    fake_again,
    fake_call,
    is_call,
    module_class,
    module_path,
    module_stack,
    only_user,
    shape,
    strip,
)
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.testing import DYNAMIC, graph_of, only_call, run
from tests.passes.support import Attention, Mlp


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


def test_a_dynamic_size_is_read_once_and_before_it_is_used() -> None:
    gm = graph_of(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), torch.randn(3, 4), dynamic_shapes=({0: DYNAMIC},))
    linear, relu = only_call(gm, aten.linear.default), only_call(gm, aten.relu.default)
    late = Emitter(first(gm, "output"))
    (rows, _), (again, _) = late.sizes(relu), late.sizes(linear)
    assert isinstance(rows, Node) and rows is again and rows.args == (relu, 0)
    (early, _) = Emitter(relu).sizes(linear)
    assert isinstance(early, Node) and early < relu
    assert late.sizes(relu)[0] is early  # the first that stands in front


def test_emitted_nodes_keep_the_annotations_of_what_they_replace() -> None:
    gm = graph_of(Mlp(), torch.randn(2, 8))
    relu = only_call(gm, aten.relu.default)
    relu.meta["custom"] = {"note": 1}
    new = Emitter(relu)(aten.neg.default, relu.args[0])
    assert new.meta["custom"] == {"note": 1}
    assert new.meta["custom"] is not relu.meta["custom"]


def test_a_call_made_again_has_the_strides_and_dtype_of_its_operands() -> None:
    gm = graph_of(nn.ReLU(), torch.randn(3, 4))
    relu = only_call(gm, aten.relu.default)
    operand = relu.all_input_nodes[0]
    with operand.meta["val"].fake_mode:
        operand.meta["val"] = torch.empty(4, 3, dtype=torch.float16).t()
    again = fake_again(relu)
    assert (again.dtype, again.stride()) == (torch.float16, (1, 3)) and relu.meta["val"].stride() == (4, 1)


@pytest.mark.parametrize("transposed", [False, True])
def test_calls_that_are_alike_have_equal_values_in_memory_of_their_own(transposed: bool) -> None:
    mode = FakeTensorMode()
    with mode:
        x, scale = torch.empty(32, 64), torch.empty(())
        x = x.t() if transposed else x
        wanted = QUANTIZE(x, scale, format="fp8")  # as torch makes it
    made = [fake_call(mode, QUANTIZE, (x, scale), {"format": "fp8"}) for _ in range(3)]
    for value in made:
        assert (value.shape, value.stride(), value.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert value.fake_mode is mode and value.device == wanted.device
    assert len({storage_id(value) for value in made}) == 3
    half = fake_call(mode, DEQUANTIZE, (made[0], scale), {"format": "fp8", "dtype": torch.float16})
    whole = fake_call(mode, DEQUANTIZE, (made[0], scale), {"format": "fp8", "dtype": torch.float32})
    assert (half.dtype, whole.dtype) == (torch.float16, torch.float32)


def test_a_call_that_makes_two_tensors_has_both() -> None:
    mode = FakeTensorMode()
    with mode:
        x, scale = torch.empty(4, 32), torch.empty(())
    for _ in range(2):
        codes, blocks = fake_call(mode, DYNAMIC_QUANTIZE, (x, scale), {"format": "nvfp4"})
        assert (codes.shape, blocks.shape) == ((4, 16), (4, 2))
        assert codes.dtype is get_format("nvfp4").storage
