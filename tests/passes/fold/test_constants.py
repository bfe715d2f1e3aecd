"""Rearranged and cast constants are stored as they are used; nothing is dequantized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.errors import PassError
from passes.fold.constants import FoldConstants
from passes.graph import aten
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.passes.support import insert

LAYOUTS = {
    "transpose": lambda w: w.transpose(0, 1),
    "permute and reshape": lambda w: w.permute(1, 0).reshape(2, 12),
    "cast": lambda w: torch.ops.aten._to_copy(w, dtype=torch.float16),
    "cat": lambda w: torch.cat([w, w.t().reshape(4, 6)]),
    "unsqueeze": lambda w: w.unsqueeze(0),
}


class Layout(nn.Module):
    """x + the sum of a rearranged weight; the weight itself as well, if `shared`."""

    def __init__(self, layout: str, *, shared: bool = False) -> None:
        super().__init__()
        self.layout, self.shared = layout, shared
        self.w = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = LAYOUTS[self.layout](self.w)
        return (x + y.sum(), *((self.w.sin(),) if self.shared else ()))


@pytest.mark.everyday(2)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_folded(layout: str, shared: bool) -> None:
    gm = graph_of(Layout(layout, shared=shared), torch.randn(3), dynamic_shapes=({0: DYNAMIC},))
    rewrites(FoldConstants, gm, torch.randn(5), rtol=1e-5, atol=1e-5)
    assert (
        count(gm, aten.transpose.int, aten.permute.default, aten._to_copy.default, aten.cat.default, aten.t.default)
        == 0
    )
    # a constant of several roots takes none of their names; what nothing reads any more is left out by `lift`
    assert len(list(gm.parameters())) == 1 + (shared or layout == "cat")
    assert "w" in dict(gm.named_parameters())


def test_what_depends_on_an_input_is_not_folded() -> None:
    class Dependent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.w, x]).transpose(0, 1)

    assert declines(FoldConstants, graph_of(Dependent(), torch.randn(2, 6))) == []


def test_no_quantization_operator_is_evaluated() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w.transpose(0, 1))

    x = torch.randn(2, 4)
    gm = graph_of(Transposed(), x)
    insert(gm, {"weight": torch.tensor(0.01)})
    expected = run(gm, x)
    assert declines(FoldConstants, gm) == []  # FoldWeights has to come first: codes, then their layout
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (1, 1)
    assert torch.equal(run(gm, x)[0], expected[0])


def test_a_program_that_changes_a_buffer_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(1, 1))

        def forward(self, x: Tensor) -> Tensor:
            before = self.steps.clone().reshape(1)
            self.steps.add_(1)
            return x + before

    with pytest.raises(PassError, match="steps"):
        graph_of(Counter(), torch.randn(3))
