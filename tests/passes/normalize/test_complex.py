"""Complex numbers as pairs of real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from passes.graph import aten
from passes.normalize.complex import ComplexToReal
from passes.normalize.noops import RemoveNoOps
from passes.testing import DYNAMIC, count, declines, graph_of, returns, rewrites, run
from passes.traits import is_complex

ANGLES = torch.arange(6.0)[:, None] / 10 ** (torch.arange(4) / 4)[None]
TABLE = torch.polar(torch.ones_like(ANGLES), ANGLES)


class Rotary(nn.Module):
    """`[B, S, 8]` rotated by complex factors `[S, 4]`, as it is written in complex numbers."""

    def __init__(self, factors: Callable[[Rotary, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.factors = factors
        self.register_buffer("table", TABLE.clone())
        self.register_buffer("inv_freq", ANGLES[1])

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        z = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * self.factors(self, x, positions)).flatten(-2)


FACTORS: dict[str, Callable[[Rotary, Tensor, Tensor], Tensor]] = {
    "table": lambda m, x, p: m.table[: x.shape[1]],
    "positions": lambda m, x, p: m.table[p],
    "index_select": lambda m, x, p: m.table.index_select(0, p),
    "split": lambda m, x, p: torch.cat([part[: x.shape[1]] for part in m.table.split([1, 3], 1)], -1),
    "unbind": lambda m, x, p: torch.stack(m.table[p].unbind(-1), -1),
    "polar": lambda m, x, p: torch.polar(torch.ones(len(p), 4), p[:, None].float() * m.inv_freq),
    "complex": lambda m, x, p: torch.complex((p[:, None] * m.inv_freq).cos(), (p[:, None] * m.inv_freq).sin()),
    "exp": lambda m, x, p: torch.exp(1j * p[:, None].float() * m.inv_freq),
    "conj": lambda m, x, p: m.table[p].conj() * m.table[p] * m.table[p],
    "quotients": lambda m, x, p: 1.0 / m.table[p] + m.table[p] / (m.table[p] + 2.0) - (m.table[p] / 2.0),
    "reshaped": lambda m, x, p: m.table[p].unsqueeze(0).transpose(1, 2).flip(-1).permute(0, 2, 1).expand(2, -1, -1),
    "real factor": lambda m, x, p: m.table[p] * m.inv_freq * 0.5 - p[:, None] * 0.1,
    "mixed": lambda m, x, p: torch.where(p[:, None] > 1, m.table[p], m.inv_freq),
    "cast": lambda m, x, p: m.table[p] * m.inv_freq.to(torch.complex64),
    "double": lambda m, x, p: m.table.to(torch.complex128)[p].to(torch.complex64),
    "matmul": lambda m, x, p: m.table[p] @ m.table[:4],
    "einsum": lambda m, x, p: torch.einsum("sd,de->se", m.table[p], m.table[:4]),
    "sum": lambda m, x, p: m.table[p].sum(-1, keepdim=True) - (2 + 1j) * m.table[p].mean(0),
    "neg": lambda m, x, p: -m.table[p] + 1j,
    "real plus imaginary": lambda m, x, p: (p[:, None].float() + 1j) * m.table[p] - (p[:, None] - 2j),
    "number minus": lambda m, x, p: 1.0 - m.table[p] + (2j - m.table[p]),
    "over imaginary": lambda m, x, p: m.table[p] / 2j + p[:, None] / (1 - 1j),
    "imaginary over": lambda m, x, p: 2j / m.table[p] + 1j / (p[:, None] + 1),
    "powers": lambda m, x, p: m.table[p] ** 2 + m.table[p].square() * m.table[p] ** 3,
    "filled": lambda m, x, p: m.table[p].masked_fill(p[:, None] > 2, 1j) + torch.zeros_like(m.table[p]),
    "padded": lambda m, x, p: nn.functional.pad(m.table[p, :3], (0, 1), value=2.0),
    "created": lambda m, x, p: torch.full((5, 4), 1 + 1j) * torch.ones_like(m.table[p]) + torch.ones(4) * 1j,
    "where numbers": lambda m, x, p: torch.where(p[:, None] > 2, m.inv_freq + 0j, 1j),
}


@pytest.mark.everyday(4)
@pytest.mark.parametrize("factors", FACTORS)
def test_rotary_embeddings_become_real_arithmetic(factors: str) -> None:
    x, positions = torch.randn(2, 5, 8), torch.tensor([0, 3, 1, 2, 5])
    gm = graph_of(Rotary(FACTORS[factors]), x, positions)
    RemoveNoOps()(gm)  # assertions of a dtype
    rewrites(ComplexToReal, gm, x, positions, rtol=1e-5, atol=1e-5)
    assert not any(is_complex(node) for node in gm.graph.nodes)


def test_lengths_may_be_dynamic() -> None:
    x, positions = torch.randn(2, 5, 8), torch.arange(5)
    length = {1: DYNAMIC}
    module = Rotary(lambda m, x, p: m.table[p])
    gm = graph_of(module, x, positions, dynamic_shapes=(length, {0: DYNAMIC}))
    x, positions = torch.randn(2, 3, 8), torch.tensor([5, 4, 0])
    rewrites(ComplexToReal, gm, x, positions, rtol=1e-5, atol=1e-5)
    assert not any(is_complex(node) for node in gm.graph.nodes)


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(x)


def test_a_half_is_never_a_complex_half() -> None:
    x = torch.randn(2, 4, 2).half()
    gm = graph_of(Of(lambda x: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(x))), x)
    ComplexToReal()(gm)
    assert not any(is_complex(node) for node in gm.graph.nodes)
    wide = torch.view_as_complex(x.float())
    assert_close(run(gm, x)[0].float(), torch.view_as_real(wide * wide), rtol=0.01, atol=0.01)


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.view_as_complex(x).real,
        lambda x: (torch.view_as_complex(x) * 2j).imag,
        lambda x: (torch.view_as_complex(x) + 1).angle(),
        lambda x: (torch.view_as_complex(x) * 2j).to(torch.float32),
        lambda x: (x.view(torch.complex64) * 2j).view(torch.float32),
        lambda x: torch.view_as_real(x.view(torch.complex64).squeeze(-1) * 1j),
    ],
)
def test_real_numbers_of_complex_ones(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 4, 2)
    gm = graph_of(Of(function), x)
    RemoveNoOps()(gm)
    rewrites(ComplexToReal, gm, x, rtol=1e-6, atol=1e-6)
    assert not any(is_complex(node) for node in gm.graph.nodes)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: torch.fft.irfft(torch.fft.rfft(x)[..., :3] * 0.5j, n=8), 2),  # the transforms
        (lambda x: (torch.view_as_complex(x.reshape(2, 4, 2)) * 1j).abs(), 1),
        (lambda x: (torch.fft.rfft(x) * 2).imag, 1),
    ],
)
def test_what_has_no_real_form_stands_between_views(function: Callable[[Tensor], Tensor], left: int) -> None:
    x = torch.randn(2, 8)
    gm = graph_of(Of(function), x)
    rewrites(ComplexToReal, gm, x, fired=1, rtol=1e-5, atol=1e-5)
    touching = [node for node in gm.graph.nodes if is_complex(node) or any(map(is_complex, node.all_input_nodes))]
    assert len(touching) - count(gm, aten.view_as_complex.default, aten.view_as_real.default) == left


@pytest.mark.parametrize(
    "function", [lambda x: torch.fft.rfft(x).abs(), lambda x: torch.view_as_real(torch.fft.fft(x)), lambda x: x + 1]
)
def test_what_is_as_good_as_it_can_be_stays(function: Callable[[Tensor], Tensor]) -> None:
    assert declines(ComplexToReal, graph_of(Of(function), torch.randn(2, 8))) == []


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z.to(torch.bool),  # an imaginary part that is not 0 is true, too
        lambda z: z.view(torch.float64),
        lambda z: torch.view_as_real(torch.add(z, z, alpha=2j)),
    ],
    ids=["truth", "bits", "a complex factor of a summand"],
)
def test_what_is_no_arithmetic_on_parts_keeps_its_values(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]]])
    gm = graph_of(Of(lambda x: function(torch.view_as_complex(x) * 2j)), x)
    expected = run(gm, x)
    ComplexToReal()(gm)
    for got, want in zip(run(gm, x), expected, strict=True):
        assert torch.equal(got, want)


def test_another_user_and_an_output_keep_the_complex_tensor() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.view_as_complex(x) * 1j
        return z, torch.view_as_real(z) + 1

    x = torch.randn(2, 4, 2)
    gm = graph_of(Of(both), x)
    rewrites(ComplexToReal, gm, x, rtol=0, atol=0)
    results = gm.graph.output_node().args[0]
    returns(gm, results[1])  # type: ignore[index,arg-type]
    gm.graph.eliminate_dead_code()
    assert not any(is_complex(node) for node in gm.graph.nodes)
