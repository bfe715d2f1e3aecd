"""What counts as a position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.graph import aten
from passes.legalize.positions import positions
from passes.testing import graph_of

T = torch.randn(3)


class Model(nn.Module):
    """`compute(x, w)` with w a parameter."""

    def __init__(self, compute: Any) -> None:
        super().__init__()
        self.compute, self.w = compute, nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Any:
        return self.compute(x, self.w)


def found(compute: Any, x: Tensor = T, narrowest: torch.dtype = torch.float32) -> set[object]:
    """Operators of the positions of a model."""
    gm = graph_of(Model(compute), x)
    learned = {node for node in gm.graph.nodes if node.op == "get_attr" and node.target == "w"}
    for node in gm.graph.nodes:
        if learned & set(node.all_input_nodes):
            learned.add(node)
    return {node.target for node in positions(gm.graph, learned, narrowest)}


CASES: dict[str, tuple[Any, set[object]]] = {
    "an angle and all that leads to it": (
        lambda x, w: (x[:, None] * 1000).cos(),
        {aten.cos.default, aten.mul.Tensor, aten.unsqueeze.default},
    ),
    "with other users": (lambda x, w: ((x * 2).sin(), (x * 2) @ w), {aten.sin.default, aten.mul.Tensor}),
    "a product of a position and a frequency": (
        lambda x, w: (x[:, None] @ torch.ones(1, 4)).sin(),
        {aten.sin.default, aten.matmul.default, aten.unsqueeze.default},
    ),
    "learned frequencies": (lambda x, w: (x * w).sin(), {aten.sin.default, aten.mul.Tensor}),
    "an index": (lambda x, w: w[(x * 2).long()], {aten._to_copy.default, aten.mul.Tensor}),
    "the angle of data, not the data": (lambda x, w: ((x @ w) * 3).sin(), {aten.sin.default, aten.mul.Tensor}),
    "data that is used elsewhere": (lambda x, w: (y := x * w) + y.sin(), {aten.sin.default}),
    "no angle": (lambda x, w: (x * 2).tanh() + (x > 0).to(torch.bool), set()),
}


@pytest.mark.parametrize("case", CASES)
def test_positions(case: str) -> None:
    compute, expected = CASES[case]
    assert found(compute) == expected


def test_an_angle_that_was_narrow_already_is_none() -> None:
    assert found(lambda x, w: x.half().sin()) == set()
    assert found(lambda x, w: (x.double() * 2).sin()) == {aten._to_copy.default, aten.mul.Tensor, aten.sin.default}
