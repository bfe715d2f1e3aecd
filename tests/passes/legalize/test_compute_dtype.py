"""float32 models compute in half precision, but for positions, masks and what crosses the border."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import FileCheck

from passes.constants import add_constant
from passes.fold.constants import FoldConstants
from passes.fuse.attention_qdq import FuseAttentionQdq
from passes.graph import aten, calls, dtype, module_path
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.normalize.noops import RemoveNoOps
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, blank, count, declines, graph_of, only_call, returns, run
from tests.passes.support import Attention, Mlp, insert

HALF = (torch.float16, torch.bfloat16)
LOWEST = torch.finfo(torch.float32).min
S = torch.tensor(0.02)


def to_half(gm: GraphModule, target: torch.dtype = torch.float16) -> GraphModule:
    """`gm` converted, after the check that converting it again changes nothing."""
    make = lambda: ConvertComputeDtype(torch.float32, target)  # noqa: E731
    assert make()(gm).modified
    declines(make, gm)
    return gm


def check(module: nn.Module, *inputs: Tensor, target: torch.dtype = torch.float16, atol: float = 0.02) -> GraphModule:
    gm = graph_of(module, *inputs)
    RemoveNoOps()(gm)
    expected = run(gm, *inputs)
    got = run(to_half(gm, target), *inputs)
    for g, w in zip(got, expected, strict=True):
        torch.testing.assert_close(g, w, rtol=0.02, atol=atol)  # dtypes are compared too
    return gm


@pytest.mark.parametrize("target", HALF)
def test_linear_layers_are_half_and_the_border_is_not(target: torch.dtype) -> None:
    gm = graph_of(Mlp(), torch.randn(2, 8), dynamic_shapes=({0: DYNAMIC},))
    x = torch.randn(5, 8)
    expected = run(gm, x)
    (got,) = run(to_half(gm, target), x)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, expected[0], rtol=0.05, atol=0.05)
    assert {dtype(n) for n in gm.graph.nodes if n.target is aten.linear.default} == {target}
    FoldConstants()(gm)
    assert {p.dtype for p in gm.parameters()} == {target}
    assert count(gm, aten._to_copy.default) == 2  # one in, one out


@given(x=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(8)), elements=st.floats(width=32)))
def test_values_of_every_kind_become_those_of_a_half_model(
    converted: tuple[GraphModule, nn.Module], x: np.ndarray
) -> None:
    gm, half = converted
    tensor = torch.from_numpy(x)
    torch.testing.assert_close(run(gm, tensor)[0], half(tensor.half()).float(), equal_nan=True, rtol=0, atol=0)


@pytest.fixture(scope="module")
def converted() -> tuple[GraphModule, nn.Module]:
    module = Mlp()
    gm = graph_of(module, torch.randn(3, 8), dynamic_shapes=({0: DYNAMIC},))
    ConvertComputeDtype(torch.float32, torch.float16)(gm)
    return gm, copy.deepcopy(module).half().requires_grad_(False)


class Rotary(nn.Module):
    """cos(position * inv_freq), as rotary embeddings make it, on a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(4) / 4), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * self.inv_freq
        return self.proj(x) * angle.cos(), angle


def test_positions_stay_float32_even_beyond_2048() -> None:
    x = torch.randn(1, 3000, 4)
    gm = graph_of(Rotary(), x)
    expected = run(gm, x)
    got = run(to_half(gm), x)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=0.01, atol=0.01)
    FileCheck().check("aten.cos.default").check("aten._to_copy.default(cos").check("aten.mul").run(gm.code)
    assert dtype(only_call(gm, aten.cos.default)) is torch.float32


def test_a_cast_belongs_to_the_module_that_made_the_values() -> None:
    gm, emit, (x,) = blank(torch.randn(3, 4))
    steps = emit(aten.arange.start_step, 0.0, 4.0, dtype=torch.float32)
    product = emit(aten.mul.Tensor, x, emit(aten.cos.default, steps))
    weight = add_constant(gm, "w", nn.Parameter(torch.eye(4)), x)
    phases = emit(aten.matmul.default, product, weight)
    positive = emit(aten.relu.default, phases)  # stands between the phases and the sine, which widens them
    angles = emit(aten.sin.default, phases)
    for node, path in ((product.args[1], "rotary"), (product, "attention"), (angles, "waves")):
        node.meta["nn_module_stack"] = {path: (path, nn.Module)}  # type: ignore[union-attr]
    returns(to_half(returns(gm, angles, positive)), angles)
    owners = {(node.args[0].op, module_path(node)) for node in calls(gm.graph, aten._to_copy.default)}  # type: ignore[union-attr]
    assert owners - {("call_function", "")} == {  # those of the outputs belong to nobody
        ("get_attr", ""), ("placeholder", "attention"), ("call_function", "rotary"), ("call_function", "waves"),
    }  # fmt: skip


class Timestep(nn.Module):
    """A sinusoidal embedding of a float timestep, as in diffusion models; `learned` frequencies are a parameter."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 4)
        frequencies = torch.exp(-torch.arange(4) * 2.3)
        self.frequencies = nn.Parameter(frequencies) if learned else frequencies

    def embed(self, t: Tensor) -> Tensor:
        angle = t[:, None] * 1000 * self.frequencies[None]
        return torch.cat([angle.cos(), angle.sin()], -1)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.embed(t)
        return self.proj(embedding), embedding


@pytest.mark.parametrize("learned", [False, True])
def test_the_sine_of_an_input_is_as_exact_as_it_was(learned: bool) -> None:
    t = torch.tensor([0.98123, 3.5, 40.0])
    gm = graph_of(Timestep(learned), t, dynamic_shapes=({0: DYNAMIC},))
    expected = run(gm, t)
    got = run(to_half(gm), t)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=0.01, atol=0.01)
    assert dtype(only_call(gm, aten.linear.default)) is torch.float16
    assert count(gm, aten._to_copy.default) == 4  # of the embedding, the weight, the bias and the result


def test_rotary_embeddings_of_float_ids_are_exact_beyond_2048() -> None:
    class FloatIds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
            angle = torch.cat([ids[:, 0:1].double(), ids[:, 1:2].double()], -1).repeat(1, 2) * 0.5
            return self.proj(x) * angle.cos().float(), angle

    x, ids = torch.randn(3, 4), torch.tensor([[0.0, 4001.0], [1.0, 4002.0], [2.0, 4003.0]])
    gm = graph_of(FloatIds(), x, ids)
    expected = run(gm, x, ids)
    got = run(to_half(gm), x, ids)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=0.01, atol=0.01)


def test_float_indices_are_exact() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3000, 4)

        def forward(self, t: Tensor) -> Tensor:
            return self.table((t * 3).long())

    gm = check(Looked(), torch.tensor([999.0, 1.0]), atol=1e-3)
    assert dtype(only_call(gm, aten.embedding.default)) is torch.float16


class Periodic(nn.Module):
    """A sine of data: of a linear layer, whose result is used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.alpha, self.second = nn.Linear(4, 4), nn.Parameter(torch.full((4,), 3.0)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y + (y * self.alpha).sin().square())


def test_a_periodic_activation_computes_its_angle_in_float32_and_the_rest_in_half() -> None:
    gm = check(Periodic(), torch.randn(2, 4))
    assert {dtype(n) for n in gm.graph.nodes if n.target is aten.linear.default} == {torch.float16}
    assert dtype(only_call(gm, aten.sin.default)) is torch.float32
    assert dtype(only_call(gm, aten.add.Tensor)) is torch.float16


def test_another_user_of_a_position_computes_in_half() -> None:
    class Twice(Timestep):
        def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.proj(self.embed(t)) * t[:, None], (t * 1000).sin()

    gm = check(Twice(), torch.tensor([0.981, 0.5]))
    assert dtype(only_call(gm, aten.linear.default)) is torch.float16


def test_a_wider_target_computes_positions_in_it_too() -> None:
    class Half(Timestep):
        def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.proj(self.embed(t)), t.sin()

    t = torch.tensor([0.981]).bfloat16()
    gm = graph_of(Half(learned=True).bfloat16(), t)
    assert ConvertComputeDtype(torch.bfloat16, torch.float16)(gm).modified
    assert {dtype(n) for n in gm.graph.nodes if n.target is aten.cos.default} == {torch.float16}


# --- masks ---------------------------------------------------------------------------------------------------------


class AddedMask(nn.Module):
    """Scores of a linear layer, with an additive mask made of a padding mask, and a row that is masked as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (self.proj(x) + (1.0 - keep.float()) * LOWEST).softmax(-1)


class FilledMask(AddedMask):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.proj(x).masked_fill(keep == 0, LOWEST).softmax(-1)


class WhereMask(AddedMask):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return (self.proj(x) + torch.where(keep > 0, 0.0, LOWEST)).softmax(-1)


class SdpaMask(AddedMask):
    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q = self.proj(x)[None]
        return scaled_dot_product_attention(q, q, q, (1.0 - keep.float()) * LOWEST)


class TwiceUsedMask(AddedMask):
    """Another reader meets the mask before the attention does."""

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, mask = self.proj(x)[None], (1.0 - keep.float()) * LOWEST
        return q * (mask == 0), scaled_dot_product_attention(q * mask.clamp(-1.0), q, q, mask)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("module", [AddedMask(), FilledMask(), WhereMask(), SdpaMask(), TwiceUsedMask()],
                         ids=lambda m: type(m).__name__)  # fmt: skip
def test_masks_do_not_become_infinite(module: nn.Module) -> None:
    keep = torch.ones(4, 4, dtype=torch.int64).tril()
    keep[2] = 0
    gm = graph_of(module, torch.randn(4, 4), keep)
    RemoveNoOps()(gm)
    to_half(gm)
    x = torch.randn(4, 4)
    got, want = run(gm, x, keep), run(graph_of(module, x, keep), x, keep)
    for g, w in zip(got, want, strict=True):
        assert g.isfinite().all()
        rows = [0, 1, 3]  # of a row that is masked as a whole, only that it is finite
        torch.testing.assert_close(g[..., rows, :], w[..., rows, :], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("make", [AddedMask, WhereMask], ids=lambda m: m.__name__)
def test_a_score_added_to_a_mask_does_not_become_infinite(make: type[AddedMask]) -> None:
    module = make()
    nn.init.constant_(module.proj.bias, -100.0)
    x, keep = torch.randn(4, 4), torch.zeros(4, 4, dtype=torch.int64)
    gm = graph_of(module, x, keep)
    RemoveNoOps()(gm)
    (got,) = run(to_half(gm), x, keep)
    torch.testing.assert_close(got.sum(-1), torch.ones(4), rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", ["input", "buffer"])
def test_a_float_mask_of_an_attention_does_not_become_infinite(kind: str) -> None:
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), LOWEST)
    mask[2] = LOWEST

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, q: Tensor, m: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, q, q, self.mask if kind == "buffer" else m)

    q = torch.randn(1, 2, 4, 4)
    gm = graph_of(Masked(), q, mask)
    (want,), (got,) = run(gm, q, mask), run(to_half(gm), q, mask)
    assert got.isfinite().all()
    rows = [0, 1, 3]  # the other one is masked as a whole: which average it gives does not matter
    torch.testing.assert_close(got[..., rows, :], want[..., rows, :], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("whole", ["bool", "float"])
def test_a_mask_of_the_fused_attention_does_not_become_infinite(whole: str) -> None:
    x, mask = torch.randn(1, 4, 16), torch.ones(1, 1, 4, 4, dtype=torch.bool).tril(-1)

    class Masked(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            assert mask is not None
            return super().forward(x, mask if whole == "bool" else (1.0 - mask.to(torch.float32)) * LOWEST)

    gm = graph_of(Masked(scale=1.0), x, mask)
    insert(gm, {"q": S, "k": S, "v": S})
    FuseAttentionQdq()(gm)
    expected = run(gm, x, mask)
    to_half(gm)
    assert dtype(only_call(gm, ATTENTION)) is torch.float16
    torch.testing.assert_close(run(gm, x, mask), expected, rtol=0.05, atol=0.05)


# --- mixed precision -----------------------------------------------------------------------------------------------


class Upcast(nn.Module):
    """A half-precision model that computes its softmax in float32 on purpose, and a mask in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4).half()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.proj(x)
        p = y.float().softmax(-1)
        return p.to(y.dtype) * y, p, y.double()


def test_explicit_upcasts_of_a_half_model_stay() -> None:
    x = torch.randn(2, 4).half()
    gm = graph_of(Upcast(), x)
    RemoveNoOps()(gm)
    expected = run(gm, x)
    assert ConvertComputeDtype(torch.float16, torch.bfloat16)(gm).modified
    got = run(gm, x)
    assert [g.dtype for g in got] == [torch.float16, torch.float32, torch.float64]
    for g, w in zip(got, expected, strict=True):
        torch.testing.assert_close(g, w, rtol=0.05, atol=0.05)
    assert dtype(only_call(gm, aten.softmax.int)) is torch.float32
    assert dtype(only_call(gm, aten.linear.default)) is torch.bfloat16


class Downcast(nn.Module):
    """A float32 model that computes a part in half precision on purpose."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.half().sin()
        return y.float().exp(), y


def test_explicit_downcasts_keep_their_dtype() -> None:
    gm = check(Downcast(), torch.randn(2, 4))
    assert count(gm, aten._to_copy.default) <= 3


class Parts(nn.Module):
    """A float32 model with a layer and a table in bfloat16, which it casts, and a position beyond 65504."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.body = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(4).bfloat16())

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        y = self.part(x.bfloat16())
        return self.body(y.float() + x * self.table.float() + (t * 100000.0).sin()), y


def test_parts_of_a_float32_model_in_bfloat16_compute_in_float16() -> None:
    x, t = torch.randn(2, 4), torch.tensor([[0.981], [3.25]])
    gm = graph_of(Parts(), x, t)
    RemoveNoOps()(gm)
    expected = run(gm, x, t)
    got = run(to_half(gm), x, t)
    assert {dtype(n) for n in gm.graph.nodes if n.target is aten.linear.default} == {torch.float16}
    assert dtype(only_call(gm, aten.sin.default)) is torch.float32
    assert got[1].dtype is torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0.03)


def test_inputs_outputs_and_integers_keep_their_dtype() -> None:
    class Embeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            y = self.head(self.embed(ids) + x)
            return y, y.argmax(-1), ids, x, y.chunk(3, -1)[1]

    gm = check(Embeds(), torch.arange(3), torch.randn(3, 4))
    assert dtype(only_call(gm, aten.embedding.default)) is torch.float16


def test_another_user_of_an_input_keeps_its_values_bit_for_bit() -> None:
    class Returned(Mlp):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    x = torch.randn(2, 8)
    gm = to_half(graph_of(Returned(), x))
    assert torch.equal(run(gm, x)[1], x)


def test_a_quantized_weight_stays_in_its_dtype_until_it_is_codes() -> None:
    x = torch.randn(2, 8)
    gm = graph_of(Mlp(), x)
    insert(gm, {"weight": torch.tensor(0.01), "input": S})
    to_half(gm)
    sources = [node.args[0] for node in gm.graph.nodes if node.target is QUANTIZE]
    assert {dtype(s) for s in sources if s.op == "get_attr"} == {torch.float32}
    assert {dtype(s) for s in sources if s.op != "get_attr"} == {torch.float16}
    run(gm, x)


def test_the_codes_of_a_buffer_become_half_at_once() -> None:
    class Transform(nn.Module):  # a discrete cosine transform
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.table)

    gm = graph_of(Transform(), torch.randn(2, 8))
    insert(gm, {"input": S, "weight": S})
    to_half(gm)
    assert {dtype(node) for node in calls(gm.graph, DEQUANTIZE)} == {torch.float16}
    assert count(gm, aten._to_copy.default) == 2  # of the input and the output


def test_attention_is_half() -> None:
    gm = check(Attention(), torch.randn(2, 5, 16))
    assert dtype(only_call(gm, SDPA)) is torch.float16


def test_a_graph_without_the_source_dtype_is_left_alone() -> None:
    assert (
        declines(lambda: ConvertComputeDtype(torch.float16, torch.bfloat16), graph_of(Mlp(), torch.randn(2, 8))) == []
    )
