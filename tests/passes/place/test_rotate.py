"""Both operands of a linear layer rotated: the same product, and nothing else touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.base import run_pipeline
from passes.constants import add_constant, constant
from passes.dependence import input_dependence
from passes.formats import FP8, INT8
from passes.graph import aten, calls, dtype, is_call
from passes.hadamard import HADAMARD, hadamard
from passes.ir import BATCHED_LINEAR, DEQUANTIZE, dequantize, quantize
from passes.pipelines import quantize_pipeline
from passes.place.rotate import RotateLinears
from passes.program import lift, unlift
from passes.quantize.insert import Quantizer
from passes.quantize.sites import find_sites
from passes.testing import DYNAMIC, blank, count, declines, graph_of, only_call, returns, rewrites, run
from tests.passes.support import Mlp, export, scale_of

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def linears(gm: GraphModule) -> list[Node]:
    return list(calls(gm.graph, aten.linear.default, BATCHED_LINEAR))


def rotating(gm: GraphModule) -> Callable[[], RotateLinears]:
    return lambda: RotateLinears(linears(gm))


def factors(gm: GraphModule) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in gm.named_buffers() if name.startswith("hadamard")}


@pytest.mark.slow
@given(
    width=st.sampled_from([4, 12, 64, 52, 96, 304, 528, 576, 624, 768, 1408]),
    lead=st.lists(st.integers(1, 3), max_size=3),
    dynamic=st.booleans(),
    bias=st.booleans(),
)
def test_the_product_stays(width: int, lead: list[int], dynamic: bool, bias: bool) -> None:
    shapes = ({axis: DYNAMIC for axis in range(len(lead))},) if dynamic else None
    gm = graph_of(
        nn.Linear(width, 3, bias=bias), torch.randn(*(size + 1 for size in lead), width), dynamic_shapes=shapes
    )
    node = only_call(gm, aten.linear.default)
    rewrites(rotating(gm), gm, torch.randn(*(size + (1 + dynamic) for size in lead), width), **CLOSE)
    assert only_call(gm, aten.linear.default) is node
    assert is_call(node.args[1], HADAMARD)


@pytest.mark.parametrize(
    ("width", "matmuls", "reshapes", "stored"),
    [
        (64, 1, 0, {"hadamard_64": (64, 64)}),
        (768, 2, 2, {"hadamard_24": (24, 24), "hadamard_32": (32, 32)}),
        (1024, 2, 2, {"hadamard_32": (32, 32)}),  # both factors are the same constant
        (688, 1, 2, {"hadamard_16": (16, 16)}),  # 43 blocks
        (1040, 1, 2, {"hadamard_208": (208, 208)}),
    ],
)
def test_what_is_traced(width: int, matmuls: int, reshapes: int, stored: dict[str, tuple[int, ...]]) -> None:
    gm = graph_of(nn.Linear(width, 4), torch.randn(2, width))
    rewrites(rotating(gm), gm, torch.randn(2, width), **CLOSE)
    assert (count(gm, aten.matmul.default), count(gm, aten.reshape.default)) == (matmuls, reshapes)
    assert factors(gm) == stored


class Shared(nn.Module):
    """Three layers read one tensor, and so does sin."""

    def __init__(self, width: int = 768) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, 8) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(8, 4)
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        return self.down(self.q(y) + self.k(y) * self.v(y)), y.sin(), self.last(x)


def test_a_tensor_is_rotated_once_and_the_factors_are_stored_once() -> None:
    gm = graph_of(Shared(), torch.randn(2, 5, 768), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    x = torch.randn(3, 7, 768)
    sin = run(gm, x)[1]
    rewrites(rotating(gm), gm, x, fired=5, **CLOSE)
    assert torch.equal(run(gm, x)[1], sin)
    q, k, v, *_ = linears(gm)
    assert q.args[0] is k.args[0] is v.args[0]
    assert count(gm, aten.matmul.default) == 2 + 2 + 1
    assert factors(gm) == {"hadamard_24": (24, 24), "hadamard_32": (32, 32), "hadamard_8": (8, 8)}
    assert sum(node.op == "get_attr" and "hadamard" in str(node.target) for node in gm.graph.nodes) == 3


def test_a_layer_that_was_not_chosen_keeps_its_operands() -> None:
    gm = graph_of(Shared(), torch.randn(2, 768))
    chosen, other, *_ = linears(gm)
    before = other.args
    rewrites(lambda: RotateLinears({chosen}), gm, torch.randn(2, 768), **CLOSE)
    assert other.args == before
    RotateLinears({other})(gm)  # later, on its own: the factors are there already
    assert factors(gm) == {"hadamard_24": (24, 24), "hadamard_32": (32, 32)}


class Tied(nn.Module):
    """An embedding and two layers share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 12)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids)
        first = nn.functional.linear(x, self.embed.weight)
        return x, first, nn.functional.linear(x.sin(), self.embed.weight), nn.functional.linear(x, self.embed.weight)


def test_a_tied_weight_is_rotated_on_the_edges_that_were_chosen() -> None:
    ids = torch.arange(5)
    gm = graph_of(Tied(), ids)
    embedded, *_, unrotated = run(gm, ids)
    first, second, third = linears(gm)
    rewrites(lambda: RotateLinears([first, second]), gm, ids, fired=2, **CLOSE)
    assert first.args[1] is second.args[1]
    assert first.args[1] is not third.args[1]
    assert torch.equal(run(gm, ids)[0], embedded)
    assert torch.equal(run(gm, ids)[3], unrotated)


@pytest.mark.parametrize("experts", [1, 3], ids=["shared input", "own inputs"])
def test_the_experts_of_a_mixture(experts: int) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 5, 60)), nn.Parameter(torch.randn(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.qcompile.batched_linear(x, self.weight, self.bias)

    gm = graph_of(Experts(), torch.randn(experts, 4, 60), dynamic_shapes=({1: DYNAMIC},))
    rewrites(rotating(gm), gm, torch.randn(experts, 6, 60), **CLOSE)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_stays_in_it(to: torch.dtype) -> None:
    gm = graph_of(nn.Linear(48, 8).to(to), torch.randn(2, 48, dtype=to))
    weight = constant(gm, only_call(gm, aten.linear.default).args[1])
    assert weight is not None
    rewrites(rotating(gm), gm, torch.randn(2, 48, dtype=to), rtol=0.05, atol=0.05)
    node = only_call(gm, aten.linear.default)
    assert {dtype(operand) for operand in node.all_input_nodes} == {to}
    cast = node.args[1]
    assert isinstance(cast, Node) and dtype(only_call(gm, HADAMARD)) is torch.float32


def test_reasons_to_decline() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return nn.functional.linear(x, w)

    class OfConstant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.proj = nn.Parameter(torch.randn(2, 8)), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.query.t().t()) + x

    gm = graph_of(nn.Linear(10, 4), torch.randn(2, 10))
    assert declines(rotating(gm), gm) == ["the order of no Hadamard matrix, from 4 on, divides 10"]
    gm = graph_of(Product(), torch.randn(2, 8), torch.randn(4, 8))
    assert declines(rotating(gm), gm) == ["the weight is not a constant, so it cannot be rotated ahead of time"]
    gm = graph_of(OfConstant(), torch.randn(4))
    assert declines(rotating(gm), gm) == ["the input is a constant, whose rotation would be folded away"]
    gm = graph_of(Mlp(), torch.randn(2, 8))
    assert declines(lambda: RotateLinears(()), gm) == []


def test_a_layer_that_is_refused_does_not_end_the_search() -> None:
    gm, emit, (x,) = blank(torch.randn(3, 8, 10))
    weights = {"experts": (3, 8, 10), "other": (8, 10), "last": (4, 8)}
    experts, other, last = (
        add_constant(gm, name, nn.Parameter(torch.randn(size)), emit.before) for name, size in weights.items()
    )
    first = emit(BATCHED_LINEAR, x, experts)
    unchosen = emit(aten.linear.default, x, other)
    computed = emit(aten.linear.default, unchosen, emit(aten.select.int, first, 0, 0))
    product = emit(aten.linear.default, unchosen, last)
    returns(gm, product, computed, first)
    log = rewrites(lambda: RotateLinears([first, computed, product]), gm, torch.randn(3, 8, 10), **CLOSE)
    assert [decline.reason for decline in log.declined] == [
        "the order of no Hadamard matrix, from 4 on, divides 10",
        "the weight is not a constant, so it cannot be rotated ahead of time",
    ]
    assert unchosen.args[1] is other and is_call(product.args[1], HADAMARD)


def values_of(gm: GraphModule, x: Tensor) -> dict[Node, Tensor]:
    """What each node of `gm` makes of `x`."""
    interpreter = torch.fx.Interpreter(gm, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(x)
    return interpreter.env


def test_an_outlier_is_spread_over_its_block() -> None:
    x = torch.randn(64, 768)
    x[:, 5] *= 100
    gm = graph_of(nn.Linear(768, 32, bias=False), x)
    node = only_call(gm, aten.linear.default)
    (expected,) = run(gm, x)

    def error() -> float:
        values = values_of(gm, x)
        operands = [(values[operand], scale_of(values[operand], INT8)) for operand in node.all_input_nodes]
        codes = [(quantize(tensor, scale, format="int8"), scale) for tensor, scale in operands]
        coded = [dequantize(code, scale, format="int8", dtype=torch.float32) for code, scale in codes]
        return float((nn.functional.linear(*coded) - expected).norm().detach() / expected.norm())

    before = error()
    RotateLinears([node])(gm)
    assert error() < before / 4


def quantized(model: nn.Module, x: Tensor) -> GraphModule:
    """`model` rotated and quantized to FP8, computing in float16."""
    gm = graph_of(model, x, dynamic_shapes=({0: DYNAMIC},))
    assert RotateLinears(linears(gm))(gm).modified
    values = values_of(gm, x)
    sites = [site for site in find_sites(gm) if site.operand in ("input", "weight")]
    scales = {site: Quantizer(FP8, scale_of(values[site.tensor])) for site in sites}
    run_pipeline(quantize_pipeline(scales, {}, torch.float32, torch.float16), gm)
    return gm


def test_the_output_depends_on_the_input_up_to_the_end() -> None:
    """The rotated activation of Model Optimizer's issue 1424 was a constant in the file."""
    model, x = Mlp(64, 128), torch.randn(3, 64)
    gm = graph_of(model, x)
    needed = input_dependence(gm)
    RotateLinears(linears(gm))(gm)
    assert input_dependence(gm) == needed != [set()]
    assert not torch.allclose(*run(gm, x), *run(gm, -x), atol=0.1)
    gm = quantized(model, x)
    assert input_dependence(gm) == needed
    (first,), (second,) = run(gm, x), run(gm, x.flip(0))
    torch.testing.assert_close(first, second.flip(0))
    assert not torch.allclose(first, second, atol=0.1)
    torch.testing.assert_close(first, model(x).detach(), rtol=0.1, atol=0.1)


def test_the_dependence_check_sees_a_baked_activation() -> None:
    x = torch.randn(3, 64)
    gm = graph_of(nn.Linear(64, 4), x)
    RotateLinears(linears(gm))(gm)
    node = only_call(gm, aten.linear.default)
    rotated = node.args[0]
    assert isinstance(rotated, Node)
    node.update_arg(0, add_constant(gm, "rotated", values_of(gm, x)[rotated], node))
    assert input_dependence(gm) == [set()]
    assert torch.equal(*run(gm, x), *run(gm, -x))


def test_codes_are_those_of_the_rotated_weight_and_factors_are_one_half_constant_each() -> None:
    model, x = Shared(), torch.randn(3, 768)
    weight = model.q.weight.detach().clone()
    gm = quantized(model, x)
    assert count(gm, HADAMARD, aten._to_copy.default) == 4  # of the input and the three outputs
    (codes,) = [constant(gm, n) for n in gm.graph.find_nodes(op="get_attr") if n.target == "q.weight"]
    rotated, scale = hadamard(weight), dict(gm.named_buffers())["q.weight_scale"]
    assert codes is not None
    assert torch.equal(codes.float(), quantize(rotated, scale, format="fp8").float())
    stored = {name: t for name, t in gm.state_dict().items() if name.startswith("hadamard")}
    assert {name: t.dtype for name, t in stored.items()} == dict.fromkeys(
        ("hadamard_8", "hadamard_24", "hadamard_32"), torch.float16
    )
    for name, exponent in (("hadamard_8", 2), ("hadamard_24", 3), ("hadamard_32", 3)):
        assert bool((stored[name].abs() == 2.0**-exponent).all())
    assert all(is_call(operand, DEQUANTIZE) for node in linears(gm) for operand in node.args[:2])


def test_a_rotated_program_is_saved_with_its_factors() -> None:
    x = torch.randn(2, 96)
    program = export(nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 4)), x)
    gm = unlift(program)
    RotateLinears(linears(gm))(gm)
    lifted = lift(gm, program)
    assert [name for name in lifted.state_dict if name.startswith("hadamard")] == ["hadamard_96"]
    torch.testing.assert_close(lifted.module()(x), program.module()(x), **CLOSE)
