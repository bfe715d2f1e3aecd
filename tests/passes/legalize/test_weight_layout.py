"""Weights as [K, N] codes in a plain matrix product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.testing import FileCheck

from passes.fold.constants import FoldConstants
from passes.fold.weights import FoldWeights
from passes.formats import FP8, INT8, Format
from passes.graph import aten
from passes.ir import BATCHED_LINEAR, DEQUANTIZE
from passes.legalize.weight_layout import StoreWeightsTransposed
from passes.testing import DYNAMIC, count, declines, graph_of, only_call, rewrites, run
from tests.passes.support import Mlp, insert

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def folded(module: nn.Module, x: Tensor, scale: Tensor, fmt: Format = FP8, **options: object) -> GraphModule:
    gm = graph_of(module, x, **options)
    insert(gm, {"weight": scale}, fmt)
    FoldWeights()(gm)
    return gm


@pytest.mark.parametrize("fmt", [FP8, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [torch.tensor(0.01), torch.rand(6, 1) + 0.01], ids=["tensor", "channel"])
def test_the_codes_are_stored_transposed(fmt: Format, bias: bool, scale: Tensor) -> None:
    gm = folded(nn.Linear(4, 6, bias=bias), torch.randn(2, 3, 4), scale, fmt, dynamic_shapes=({0: DYNAMIC},))
    rewrites(StoreWeightsTransposed, gm, torch.randn(5, 3, 4), **TOLERANCE)
    assert (count(gm, aten.linear.default), count(gm, aten.matmul.default), count(gm, aten.add.Tensor)) == (0, 1, bias)
    rewrites(FoldConstants, gm, torch.randn(5, 3, 4), fired=1 + scale.ndim // 2, **TOLERANCE)
    FileCheck().check_not("transpose").check("dequantize").check("matmul").run(gm.code)
    assert gm.get_parameter("weight").shape == (4, 6)
    assert gm.get_parameter("weight").dtype is fmt.storage
    assert only_call(gm, DEQUANTIZE).args[1].meta["val"].shape == ((1, 6) if scale.ndim else ())  # type: ignore[union-attr]


class Repeated(nn.Module):
    """One layer three times, as ALBERT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(self.layer(x).relu()).relu())


def test_a_shared_weight_is_stored_once() -> None:
    x = torch.randn(2, 4)
    gm = folded(Repeated(), x, torch.tensor(0.01))
    rewrites(StoreWeightsTransposed, gm, x, fired=3, **TOLERANCE)
    FoldConstants()(gm)
    assert [name for name, p in gm.named_parameters() if p.dtype is torch.float8_e4m3fn] == ["layer.weight"]
    assert count(gm, DEQUANTIZE) == 1


def test_another_user_of_the_weight_keeps_its_values() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.layer.weight.sin()

    x = torch.randn(2, 4)
    gm = folded(Shared(), x, torch.tensor(0.01))
    before = run(gm, x)[1]
    rewrites(StoreWeightsTransposed, gm, x, **TOLERANCE)
    FoldConstants()(gm)
    assert torch.equal(run(gm, x)[1], before)


def test_float_layers_and_weights_that_are_no_codes_yet_stay() -> None:
    gm = graph_of(Mlp(), torch.randn(2, 8))
    assert declines(StoreWeightsTransposed, gm) == []
    insert(gm, {"input": torch.tensor(0.02)})
    assert declines(StoreWeightsTransposed, gm) == []
    assert count(gm, aten.linear.default) == 2


@pytest.mark.everyday(2)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [torch.tensor(0.01), torch.rand(3, 6, 1) + 0.01], ids=["tensor", "channel"])
def test_experts(bias: bool, scale: Tensor) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            return BATCHED_LINEAR(x.unsqueeze(0), self.w, self.b if bias else None)

    x = torch.randn(5, 4)
    gm = folded(Experts(), x, scale, dynamic_shapes=({0: DYNAMIC},))
    rewrites(StoreWeightsTransposed, gm, x, **TOLERANCE)
    FoldConstants()(gm)
    assert (count(gm, aten.matmul.default), count(gm, aten.mul.Tensor), count(gm, aten.add.Tensor)) == (
        1, int(scale.ndim > 0), bias,
    )  # fmt: skip
    assert gm.get_parameter("w").shape == (3, 4, 6)
    assert only_call(gm, DEQUANTIZE).args[1].meta["val"].shape == ()  # type: ignore[union-attr]
