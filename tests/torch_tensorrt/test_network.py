"""What is in the network: the codes and scales of the program, bit for bit, and no float copy of a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile

TYPES = {"FP8": torch.float8_e4m3fn, "FP4": torch.uint8, "INT8": torch.int8}


class Block(nn.Module):
    """Two linears, with a weight that nothing but a strided view of it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> tuple[Tensor, None, Tensor]:
        y: Tensor = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x, None, x + y


def quantized(recipe: str, **options: Any) -> Any:
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    return qcompile.quantize(Block(), (x,), recipe=recipe, calibration=[x], dtype=torch.float16, **options)


def filled(program: Any, **options: Any) -> tuple[Any, Any, Any]:
    """A network with the layers of `program`, what is known of it, and the lowered graph."""
    import tensorrt_rtx as trt

    from qcompile.torch_tensorrt import ProgramNetwork

    source = ProgramNetwork(program, **options)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    known = source.fill(network)
    return (trt, builder, network), known, source


def constants(trt: Any, network: Any, known: Any) -> dict[str, tuple[str, Tensor]]:
    """Name of each constant of the network -> the name of its type, and the bytes that TensorRT reads.

    The bindings do not give those of FP8 and FP4 out; the interpreter keeps the tensors whose memory the network has.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    layers = [layer for layer in layers if layer.type == trt.LayerType.CONSTANT]
    tensors = known.interpreter.ctx.cpu_weights_reference_holder
    found = {}
    for layer, tensor in zip(layers, tensors, strict=True):
        layer.__class__ = trt.IConstantLayer
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert layer.weights.size == tensor.numel() * (2 if layer.weights.dtype == trt.DataType.FP4 else 1)
        found[layer.name] = (layer.get_output(0).dtype.name, raw)
    return found


@pytest.mark.parametrize(("recipe", "kind"), [("fp8", "FP8"), ("nvfp4", "FP4"), ("int8", "INT8")])
def test_codes_and_scales_are_those_of_the_program(recipe: str, kind: str) -> None:
    program = quantized(recipe)
    (trt, _, network), known, source = filled(program)
    found = constants(trt, network, known)
    state = dict(source.graph_module.state_dict())
    codes = [name for name, tensor in state.items() if name.endswith(".weight") and tensor.dtype == TYPES[kind]]
    assert len(codes) == 2
    scales = [name for name in state if name.endswith("_scale")]
    for name in (*codes, *scales):
        assert found[name][1].equal(state[name].contiguous().reshape(-1).view(torch.uint8)), name
    assert {found[name][0] for name in codes} == {kind}
    for name in codes:  # the program has [N, K], and the pipeline stores [K, N] where codes are not packed
        mine, given = (state[name].view(torch.uint8), program.state_dict[name].view(torch.uint8))
        assert torch.equal(mine, given if kind == "FP4" else given.t())


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4", "int8", "fp8_per_channel_per_token", "nvfp4_weight_only"])
def test_no_float_copy_of_a_weight(recipe: str) -> None:
    (trt, _, network), known, _ = filled(quantized(recipe))
    wide = {n: raw.numel() for n, (kind, raw) in constants(trt, network, known).items() if kind not in TYPES}
    assert max(wide.values()) <= 128 * 64 // 8  # block scales and biases; a weight in half would be 16384 bytes
    assert sum(wide.values()) < 128 * 64


def test_inputs_and_outputs_have_their_names_and_types() -> None:
    (_, _, network), known, _ = filled(quantized("fp8"))
    assert [network.get_input(i).name for i in range(network.num_inputs)] == ["x"]
    assert [network.get_output(i).name for i in range(network.num_outputs)] == ["output_0", "output_2"]
    assert {network.get_output(i).dtype.name for i in range(2)} == {"FLOAT"}
    assert known.dimensions == {"x": [4, 64]}
    (_, _, network), _, _ = filled(quantized("fp8"), io_dtype=torch.float16)
    assert {tensor.dtype.name for tensor in (network.get_input(0), network.get_output(0))} == {"HALF"}


def test_an_input_that_nothing_reads_stays_and_a_number_goes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor, unused: Tensor, factor: int, nothing: None) -> Tensor:
            result: Tensor = self.layer(x) * factor
            return result

    args = (torch.randn(4, 64), torch.randn(3), 2, None)
    program = qcompile.quantize(Model(), args, calibration=[args], progress=False)
    (_, _, network), known, _ = filled(program)
    assert [network.get_input(i).name for i in range(network.num_inputs)] == ["x", "unused"] == [*known.dimensions]
    report = qcompile.build_engine(program, target="sm89", route="torch_tensorrt", progress=False)
    assert report.gemms["fp8"] == 1


def test_every_layer_has_a_name_of_its_own_and_a_module() -> None:
    (_, _, network), known, _ = filled(quantized("fp8"))
    names = [network.get_layer(i).name for i in range(network.num_layers)]
    assert len({*names}) == len(names) == len(known.modules)
    assert {"up", "down", "norm"} <= {*known.modules}


def test_filling_twice_gives_the_same_and_leaves_the_program_alone() -> None:
    program = quantized("fp8")
    stacks = [dict(node.meta.get("nn_module_stack", {})) for node in program.graph.nodes]
    _, first, source = filled(program)
    import tensorrt_rtx as trt

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    assert source.fill(builder.create_network(0)).modules == first.modules
    assert [dict(node.meta.get("nn_module_stack", {})) for node in program.graph.nodes] == stacks


def test_dynamic_dimensions_are_named_and_bound_by_a_profile() -> None:
    (_, _, network), known, _ = filled(quantized("fp8", dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)))
    (rows, columns) = known.dimensions["x"]
    assert isinstance(rows, str) and columns == 64
    assert tuple(network.get_input(0).shape) == (-1, 64)
    assert known.static_shapes({"x": (3, 64)})["output_0"] == (3, 64)
    assert "output_0" not in known.static_shapes({})


class Repeating(nn.Module):
    """Operands of one element along an axis, of fewer axes, numbers, and comparisons of both kinds."""

    def forward(self, x: Tensor, y: Tensor, i: Tensor) -> Tensor:
        sums = (x * self.weight + y) / 2.0 - x.mean(-1, keepdim=True) + torch.add(x, y, alpha=2)
        visible = (i.unsqueeze(0) <= i.unsqueeze(1)) & (x <= y)
        return torch.where(visible, sums, 0.0)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_operand_of_arithmetic_is_repeated_before_its_layer(dynamic: bool) -> None:
    length = torch.export.Dim.DYNAMIC if dynamic else torch.export.Dim.STATIC
    shapes = ({0: length}, {}, {})
    args = (torch.randn(3, 6, 6), torch.randn(6), torch.arange(6))
    program = torch.export.export(Repeating().eval(), args, dynamic_shapes=shapes)
    (trt, _, network), _, _ = filled(program)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    arithmetic = {"SUM", "SUB", "PROD", "DIV"}
    elementwise = [cast_to(trt.IElementWiseLayer, layer) for layer in layers if layer.type.name == "ELEMENTWISE"]
    shapes_of = [
        tuple(tuple(layer.get_input(k).shape) for k in range(2)) for layer in elementwise if layer.op.name in arithmetic
    ]
    first = -1 if dynamic else 3
    assert ((first, 6, 6), (1, 6, 1)) in shapes_of  # the weight
    assert ((first, 6, 6), (1, 1, 6)) in shapes_of  # y
    assert ((first, 6, 6), (1, 1, 1)) in shapes_of  # 2.0
    assert ((first, 6, 6), (first, 6, 1)) in shapes_of  # the mean


def test_integers_are_compared_as_not_greater_and_floats_with_nan_are_not() -> None:
    args = (torch.randn(3, 6, 6), torch.randn(6), torch.arange(6))
    (trt, _, network), _, _ = filled(torch.export.export(Repeating().eval(), args))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    names = [cast_to(trt.IElementWiseLayer, layer).op.name for layer in layers if layer.type.name == "ELEMENTWISE"]
    assert names.count("GREATER") == 1 and names.count("LESS") == 1 and names.count("EQUAL") == 1
    assert [cast_to(trt.IUnaryLayer, layer).op.name for layer in layers if layer.type.name == "UNARY"] == ["NOT"]


def cast_to(kind: Any, layer: Any) -> Any:
    """TensorRT hands out layers as ILayer; by this they get the attributes of their kind."""
    layer.__class__ = kind
    return layer
