"""Weights that are pieces of a parameter, or computed of some: constants with names of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils import parametrizations, prune

from passes.base import run_pipeline
from passes.constants import constant
from passes.graph import aten, calls
from passes.normalize.computed_weights import ComputedWeightsToConstants
from passes.normalize.weight_names import layer_of, piece_of
from passes.pipelines import NORMALIZE
from passes.quantize.sites import find_sites, linear_name
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run


class Parts(nn.Module):
    """`form(self, x)` on parameters of several shapes."""

    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.form = form
        self.w, self.b, self.s = (nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (24,), (24, 1)))
        self.batch, self.layer = nn.Parameter(torch.randn(3, 8, 8)), nn.Linear(8, 24)
        self.register_buffer("table", torch.randn(24, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self, x)


def sum_of(x: Tensor, weights: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return sum((F.linear(x, weight).sum(-1) for weight in weights), torch.zeros(()))


FORMS: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "slice": (lambda m, x: F.linear(x, m.w[:8], m.b[:8]), ["w_rows_0_8"]),
    "chunk": (lambda m, x: sum_of(x, m.layer.weight.chunk(3)), [f"layer.rows_{i}_{i + 8}" for i in (0, 8, 16)]),
    "split": (lambda m, x: sum_of(x, m.layer.weight.split([4, 20])), ["layer.rows_0_4", "layer.rows_4_24"]),
    "unbind": (lambda m, x: sum_of(x, m.batch.unbind(0)), ["batch_0", "batch_1", "batch_2"]),
    "index": (lambda m, x: F.linear(x, m.batch[2].t()), ["batch_2"]),
    "columns": (lambda m, x: x[..., :4] @ m.w[8:16, 2:6].t(), ["w_rows_8_16_columns_2_6"]),
    "matmul_and_bias": (lambda m, x: x @ m.layer.weight[:8].t() + m.b[8:16], ["layer.rows_0_8"]),
    "viewed": (lambda m, x: F.linear(x, m.w.view(3, 8, 8)[1]), ["w_rows_8_16"]),
    "strided": (lambda m, x: F.linear(x, m.w[::3]), ["w_part_0"]),
    "scaled": (lambda m, x: F.linear(x, m.layer.weight * m.s), ["layer"]),
    "both": (lambda m, x: m.layer(x) + F.linear(x, m.layer.weight * m.s), ["layer", "layer.computed_1"]),
    "scaled_piece": (lambda m, x: sum_of(x, [m.w[:8] * 2, m.w[:8] * 3]), ["w_rows_0_8", "w_rows_0_8_computed_1"]),
    "twice": (lambda m, x: sum_of(x, [m.w[:8], m.w.narrow(0, 0, 8)]), ["w_rows_0_8", "w_rows_0_8"]),
    "adapter": (lambda m, x: F.linear(x, m.layer.weight + m.s @ m.b[None, :8]), ["layer"]),
    "normalized": (lambda m, x: F.linear(x, F.normalize(m.w)), ["w"]),
    "buffer": (lambda m, x: F.linear(x, m.table[:8]), ["table_rows_0_8"]),
    "indexed": (lambda m, x: F.linear(x, m.layer.weight[torch.tensor([5, 3])]), ["layer"]),
}


class Every(nn.Module):
    """All of `forms`, each with parameters of its own: one export serves."""

    def __init__(self, forms: Mapping[str, Callable[..., Tensor]]) -> None:
        super().__init__()
        self.forms = nn.ModuleDict({name: Parts(form) for name, form in forms.items()})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [form(x) for form in self.forms.values()]


@pytest.fixture(scope="module")
def names() -> list[str]:
    """Those of all linear layers, once the values were compared."""
    x = torch.randn(2, 8)
    gm = graph_of(Every({name: form for name, (form, _) in FORMS.items()}), x)
    want = run(gm, x)
    run_pipeline(NORMALIZE, gm)
    torch.testing.assert_close(run(gm, x), want)
    names = [linear_name(node) for node in calls(gm.graph, aten.linear.default)]
    assert [site.name for site in find_sites(gm) if site.operand == "weight"] == [
        f"{n}.weight_quantizer" for n in names
    ]
    return names


@pytest.mark.everyday(2)
@pytest.mark.parametrize("form", FORMS)
def test_each_has_a_name_of_its_own(form: str, names: list[str]) -> None:
    own = f"forms.{form}."
    assert [name.removeprefix(own) for name in names if name.startswith(own)] == FORMS[form][1]


def test_values_stay_bit_for_bit_and_pieces_share_memory() -> None:
    x = torch.randn(2, 8)
    model = Parts(FORMS["split"][0])
    gm = graph_of(model, x)
    rewrites(ComputedWeightsToConstants, gm, x, fired=2)
    stored = [constant(gm, node.args[1]) for node in calls(gm.graph, aten.linear.default)]
    assert all(isinstance(s, nn.Parameter) and not s.requires_grad for s in stored)
    assert {s.untyped_storage().data_ptr() for s in stored if s is not None} == {
        model.layer.weight.untyped_storage().data_ptr()
    }


def attention(m: Parts, x: Tensor) -> Tensor:
    k, v = m.batch[:2].split(1)
    scores = x.expand(1, 2, 8) @ k.transpose(1, 2)
    return torch.bmm(scores.softmax(-1), v)


STAY: dict[str, Callable[..., Tensor]] = {
    "whole": lambda m, x: m.layer(x) + x @ m.w.t(),
    "projected_queries": lambda m, x: x @ m.layer(m.batch[0]).t()[:8],
    "normalized_queries": lambda m, x: x @ F.layer_norm(m.batch[0], (8,)),
    "table": lambda m, x: x @ m.table[:8].sin(),
    "reached": lambda m, x: F.linear(x, m.w[:8] * x.sum()),
    "random": lambda m, x: F.linear(x, torch.rand_like(m.w)),
    "no_product": lambda m, x: x + m.w[:2],
    "learned_keys": attention,
}


def test_what_is_no_weight_stays() -> None:
    assert declines(ComputedWeightsToConstants, graph_of(Every(STAY), torch.randn(2, 8))) == []


def test_experts_by_halves() -> None:
    def form(m: Parts, x: Tensor) -> Tensor:
        gate, up = m.batch.chunk(2, -1)
        rows = x.expand(3, 2, 8)
        return torch.bmm(rows, gate).relu() * torch.bmm(rows, up)

    x = torch.randn(2, 8)
    gm = graph_of(Parts(form), x)
    rewrites(ComputedWeightsToConstants, gm, x, fired=2)
    assert [s.target for s in gm.graph.find_nodes(op="get_attr")] == [
        "batch_columns_0_4_weight",
        "batch_columns_4_8_weight",
    ]


class Norms(nn.Module):
    """What torch.nn.utils makes of a layer, one of which is called twice, and a pruned patch embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_norm = parametrizations.weight_norm(nn.Linear(8, 8))
        self.spectral_norm = parametrizations.spectral_norm(nn.Linear(8, 8))
        self.orthogonal = parametrizations.orthogonal(nn.Linear(8, 8))
        self.pruned, self.patches = nn.Linear(8, 8), nn.Conv2d(3, 8, 4, 4)
        for layer in (self.pruned, self.patches):
            prune.l1_unstructured(layer, "weight", 0.5)
        self.hooked = nn.Linear(8, 8)
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(self.hooked)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = self.pruned(self.orthogonal(self.spectral_norm(self.weight_norm(x))))
        return self.hooked(x) + self.weight_norm(x)  # type: ignore[no-any-return]


@pytest.mark.everyday(2)
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_layers_of_torch_nn_utils_have_the_names_of_their_modules() -> None:
    image = torch.randn(2, 3, 8, 8)
    gm = graph_of(Norms(), image, dynamic_shapes=({0: DYNAMIC},))
    want = run(gm, image)[0]
    run_pipeline(NORMALIZE, gm)
    torch.testing.assert_close(run(gm, image)[0], want)
    names = [linear_name(node) for node in calls(gm.graph, aten.linear.default)]
    assert names == ["patches", "weight_norm", "spectral_norm", "orthogonal", "pruned", "hooked", "weight_norm"]


@pytest.mark.everyday(1)
@pytest.mark.parametrize("pieces", [["rows_0_8", "rows_8_24"], ["rows_0_8", "rows_8_16", "rows_16_24"]])
@pytest.mark.parametrize("learned", [False, True])
def test_cross_attention_of_torch(learned: bool, pieces: list[str]) -> None:
    """Also of learned queries, which no input reaches: their layer has a name to be listed under."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.queries = nn.Parameter(torch.randn(2, 3, 8))

        def forward(self, x: Tensor, memory: Tensor, value: Tensor) -> Tensor:
            memory = value if len(pieces) == 2 else memory
            result: Tensor = self.attn(self.queries if learned else x, memory, value, need_weights=False)[0]
            return result

    gm = graph_of(Cross(), torch.randn(2, 4, 8), torch.randn(2, 6, 8), torch.randn(2, 6, 8))
    run_pipeline(NORMALIZE, gm)
    names = [linear_name(node) for node in calls(gm.graph, aten.linear.default)]
    assert names == [*(f"attn.in_proj.{piece}" for piece in pieces), "attn.out_proj"]
    assert count(gm, SDPA) == 1


def test_a_returned_weight_is_no_parameter() -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            part = self.w[:2]
            return F.linear(x, part), part

    gm: GraphModule = graph_of(Returned(), torch.randn(2, 8))
    rewrites(ComputedWeightsToConstants, gm, torch.randn(2, 8))
    assert count(gm, aten.slice.Tensor) == 1
    assert [linear_name(node) for node in calls(gm.graph, aten.linear.default)] == ["w_rows_0_2"]


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("layers.0.fc.weight", ("layers.0.fc", "weight")),
        ("attn.in_proj_bias", ("attn.in_proj", "bias")),
        ("fc.parametrizations.weight.original1", ("fc", "weight")),
        ("parametrizations.weight.original", ("", "weight")),
        ("fc.weight_v", ("fc", "weight")),
        ("fc.weight_orig", ("fc", "weight")),
        ("embeddings", ("embeddings", "weight")),
    ],
)
def test_layers_of_parameters(parameter: str, layer: tuple[str, str]) -> None:
    assert layer_of(parameter) == layer


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    bounds=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5)), min_size=3, max_size=3),
)
def test_names_of_pieces_tell_them_apart(shape: tuple[int, ...], bounds: list[tuple[int, int]]) -> None:
    """A piece is called by where it lies: the same name is the same memory."""
    whole = torch.randn(shape)
    part, other = whole, whole
    for axis, (start, size) in enumerate(bounds[: len(shape)]):
        start = min(start, shape[axis] - 1)
        part = part.narrow(axis, start, min(size, shape[axis] - start))
        other = other.narrow(axis, 0, min(size, shape[axis]))
    same = (part.shape, part.storage_offset()) == (other.shape, other.storage_offset())
    if part.numel() == whole.numel():
        assert piece_of(whole, part) == ""
    assert same or piece_of(whole, part) != piece_of(whole, other)
