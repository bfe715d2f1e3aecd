"""Q/DQ on chosen edges, and on no other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.testing import FileCheck

from passes.constants import constant
from passes.formats import FP8, FP8_PER_TOKEN, INT8, Format
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE, dequantize, quantize
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import Site, find_sites
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, count, graph_of, only_call, run
from tests.passes.support import Attention, Mlp, insert

S = torch.tensor(0.02)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def qdq(x: Tensor, scale: Tensor, fmt: str = "fp8") -> Tensor:
    return dequantize(quantize(x, scale, format=fmt), scale, format=fmt, dtype=x.dtype)


def site(gm: GraphModule, name: str) -> Site:
    (found,) = (s for s in find_sites(gm) if s.name == name)
    return found


def second_run(gm: GraphModule, quantizers: dict[str, Quantizer]) -> list[str]:
    """Reasons of a run with the same quantizers on the sites that the graph has now; it changes nothing."""
    code, state = gm.code, set(gm.state_dict())
    again = InsertQdq({s: quantizers[s.name] for s in find_sites(gm) if s.name in quantizers})
    assert not again(gm).modified
    gm.recompile()
    assert (gm.code, set(gm.state_dict())) == (code, state)
    return [decline.reason for decline in again.log.declined]


class Fork(nn.Module):
    """Three layers read one tensor, which is returned as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.relu()
        return self.a(x), self.b(x), self.c(x), x


@pytest.mark.parametrize("fmt", [FP8, INT8], ids=lambda f: f.name)
def test_input_and_weight_are_quantized(fmt: Format) -> None:
    layer = nn.Linear(8, 4)
    gm = graph_of(layer, torch.randn(3, 8), dynamic_shapes=({0: DYNAMIC},))
    chosen = {"input_quantizer": Quantizer(fmt, S), "weight_quantizer": Quantizer(fmt, torch.rand(4, 1) + 0.01)}
    instance = InsertQdq({s: chosen[s.name] for s in find_sites(gm) if s.name in chosen})
    assert instance(gm).modified
    assert instance.log.fired["InsertQdq"] == 2
    FileCheck().check_count("qcompile.quantize.default", 2, exactly=True).check("aten.linear").run(gm.code)
    x = torch.randn(5, 8)
    weight = qdq(layer.weight, chosen["weight_quantizer"].scale, fmt.name)
    expected = nn.functional.linear(qdq(x, S, fmt.name), weight, layer.bias)
    torch.testing.assert_close(run(gm, x)[0], expected, rtol=1e-5, atol=1e-5)
    assert sorted(gm.state_dict()) == ["bias", "input_scale", "weight", "weight_scale"]
    second_run(gm, chosen)


def test_layers_that_agree_share_one_pair_and_other_users_keep_their_values() -> None:
    gm = graph_of(Fork(), torch.randn(3, 4))
    x = torch.randn(3, 4)
    before = run(gm, x)
    insert(gm, {"a.input_quantizer": S, "b.input_quantizer": S})
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (1, 1)
    after = run(gm, x)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    assert torch.equal(after[3], before[3])


@pytest.mark.parametrize(
    ("scale", "other"),
    [
        (S, torch.tensor(0.5)),
        (S, torch.nextafter(S, torch.tensor(1.0))),
        (S, S.reshape(1)),
        (torch.tensor([[0.1], [0.2], [0.3]]), torch.tensor([[0.1], [0.2], [0.4]])),
    ],
    ids=["value", "last bit", "shape", "one of three"],
)
def test_layers_whose_scales_differ_have_their_own_pairs(scale: Tensor, other: Tensor) -> None:
    fork = Fork()
    gm = graph_of(fork, X)
    insert(gm, {"a.input_quantizer": scale, "b.input_quantizer": other, "c.input_quantizer": scale.clone()})
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (2, 2)
    layers = {fork.a: scale, fork.b: other, fork.c: scale}
    for got, (layer, own) in zip(run(gm, X), layers.items(), strict=False):
        torch.testing.assert_close(got, layer(qdq(X.relu(), own)).detach(), rtol=1e-6, atol=1e-6)


@given(st.lists(st.sampled_from([0.01, 0.02, 0.04]), min_size=3, max_size=3))
def test_there_are_as_many_pairs_as_scales(scales: list[float]) -> None:
    gm = graph_of(Fork(), X)
    names = [f"{layer}.input_quantizer" for layer in "abc"]
    insert(gm, {name: torch.tensor(scale) for name, scale in zip(names, scales, strict=True)})
    assert count(gm, QUANTIZE) == len(set(scales))
    for layer, scale in zip("abc", scales, strict=True):
        linear = next(s.consumer for s in find_sites(gm) if s.name == f"{layer}.input_quantizer")
        pair = linear.args[0]
        assert constant(gm, pair.args[1]) == torch.tensor(scale)  # type: ignore[union-attr]


def test_layers_that_differ_in_format_have_their_own_pairs() -> None:
    gm = graph_of(Fork(), torch.randn(3, 4))
    InsertQdq(
        {
            site(gm, "a.input_quantizer"): Quantizer(FP8, S),
            site(gm, "b.input_quantizer"): Quantizer(INT8, S),
            site(gm, "c.input_quantizer"): Quantizer(FP8_PER_TOKEN, None),
        }
    )(gm)
    assert (count(gm, QUANTIZE), count(gm, DYNAMIC_QUANTIZE), count(gm, DEQUANTIZE)) == (2, 1, 3)


@pytest.mark.parametrize("first", [S, S.reshape(1), torch.full((1, 4), 0.02)], ids=lambda s: str(list(s.shape)))
def test_layers_that_differ_in_the_shape_of_the_scale_have_their_own_pairs(first: Tensor) -> None:
    gm = graph_of(Fork(), torch.randn(3, 4))
    x = torch.randn(3, 4)
    scales = {"a": first, "b": torch.tensor([[0.01], [0.02], [0.03]])}
    insert(gm, {f"{name}.input_quantizer": scale for name, scale in scales.items()})
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (2, 2)
    results = run(gm, x)
    for name, got in zip("ab", results, strict=False):
        weight, bias = gm.get_parameter(f"{name}.weight"), gm.get_parameter(f"{name}.bias")
        expected = nn.functional.linear(qdq(x.relu(), scales[name]), weight, bias)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_output_quantizer_is_seen_by_every_user_once() -> None:
    gm = graph_of(Fork(), torch.randn(3, 4))
    layer = site(gm, "a.output_quantizer")
    x = torch.randn(3, 4)
    before = run(gm, x)
    insert(gm, {"a.output_quantizer": S})
    after = run(gm, x)
    torch.testing.assert_close(after[0], qdq(before[0], S), rtol=0, atol=0)
    assert all(torch.equal(got, want) for got, want in zip(after[1:], before[1:], strict=True))
    assert [user.target for user in layer.consumer.users] == [QUANTIZE]
    assert second_run(gm, {"a.output_quantizer": Quantizer(FP8, S)}) == ["this output is quantized already"]


def test_an_input_that_an_output_quantizer_feeds_is_not_quantized_twice() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    gm = graph_of(model, torch.randn(3, 8))
    chosen = {s: Quantizer(FP8, S) for s in find_sites(gm) if s.name in ("0.output_quantizer", "1.input_quantizer")}
    instance = InsertQdq(dict(reversed(chosen.items())))
    instance(gm)
    assert count(gm, QUANTIZE) == 1
    assert [d.reason for d in instance.log.declined] == [
        "this tensor is quantized already, by the output quantizer before it"
    ]


def test_only_the_chosen_operand_of_an_attention_is_quantized() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    gm = graph_of(Same(), torch.randn(1, 2, 3, 4))
    x = torch.randn(1, 2, 3, 4)
    insert(gm, {"k": S})
    node = only_call(gm, SDPA)
    assert [operand.op for operand in node.args[:3]] == ["placeholder", "call_function", "placeholder"]  # type: ignore[union-attr]
    expected = nn.functional.scaled_dot_product_attention(x, qdq(x, S), x)
    torch.testing.assert_close(run(gm, x)[0], expected, rtol=0, atol=0)


def test_one_tensor_as_every_operand_is_quantized_once() -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    gm = graph_of(Same(), torch.randn(1, 2, 3, 4))
    insert(gm, {"q": S, "k": S, "v": S})
    assert count(gm, QUANTIZE) == 1
    assert len({operand for operand in only_call(gm, SDPA).args[:3]}) == 1


def test_a_parameter_as_an_operand_is_quantized_behind_the_inputs() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 2, 3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(self.query, x, x)

    gm = graph_of(Queries(), torch.randn(1, 2, 3, 4))
    insert(gm, {"q": S})
    assert only_call(gm, QUANTIZE).args[0].op == "get_attr"  # type: ignore[union-attr]
    ops = [node.op for node in gm.graph.nodes if node.op != "get_attr"]
    assert ops == sorted(ops, key=["placeholder", "call_function", "output"].index)


def test_the_softmax_is_left_to_fusion() -> None:
    gm = graph_of(Attention(), torch.randn(1, 3, 16))
    instance = InsertQdq({s: Quantizer(FP8, S) for s in find_sites(gm) if s.operand == "softmax"})
    assert not instance(gm).modified


@pytest.mark.parametrize("backwards", [False, True])
def test_a_tied_weight_is_quantized_once_in_front_of_all_its_users(backwards: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    gm = graph_of(Twice(), torch.randn(2, 4))
    sites = [s for s in find_sites(gm) if s.operand == "weight"]
    InsertQdq({s: Quantizer(FP8, S) for s in (reversed(sites) if backwards else sites)})(gm)
    gm.graph.lint()
    assert count(gm, QUANTIZE) == 1
    run(gm, torch.randn(2, 4))


def test_a_per_token_quantizer_measures_its_scale() -> None:
    gm = graph_of(nn.Linear(8, 4), torch.randn(3, 8), dynamic_shapes=({0: DYNAMIC},))
    InsertQdq({site(gm, "input_quantizer"): Quantizer(FP8_PER_TOKEN, None)})(gm)
    x = torch.randn(5, 8)
    scale = x.abs().amax(-1, keepdim=True) / 448
    expected = nn.functional.linear(qdq(x, scale), gm.get_parameter("weight"), gm.get_parameter("bias"))
    torch.testing.assert_close(run(gm, x)[0], expected, rtol=1e-5, atol=1e-5)


def test_both_operators_carry_the_name_of_the_quantizer_and_the_scale_its_own() -> None:
    gm = graph_of(nn.Sequential(Mlp()), torch.randn(2, 8))
    insert(gm, {"0.down.input_quantizer": S})
    for target in (QUANTIZE, DEQUANTIZE):
        node = only_call(gm, target)
        assert node.meta["custom"]["quantizer"] == "0.down.input_quantizer"
        assert constant(gm, node.args[1]) == S
        assert node.args[1].target == "0.down.input_scale"  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def quantized() -> GraphModule:
    gm = graph_of(nn.Linear(4, 4), torch.randn(3, 4), dynamic_shapes=({0: DYNAMIC},))
    insert(gm, {"input": torch.tensor(2.0**-4)})
    return gm


@given(x=hnp.arrays("float32", st.tuples(st.integers(1, 4), st.just(4)), elements=st.floats(width=32)))
def test_values_of_every_kind(quantized: GraphModule, x: object) -> None:
    tensor = torch.as_tensor(x)
    expected = nn.functional.linear(
        qdq(tensor, torch.tensor(2.0**-4)), quantized.get_parameter("weight"), quantized.get_parameter("bias")
    )
    torch.testing.assert_close(run(quantized, tensor)[0], expected, equal_nan=True, rtol=0, atol=0)
