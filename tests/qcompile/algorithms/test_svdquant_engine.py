"""Low-rank parts in the real builder: the kernels that they take, and that all else runs as without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qcompile
from tests.passes.support import Attention, Mlp

pytest.importorskip("tensorrt_rtx")


class Block(nn.Module):
    """q, k and v, and the two layers of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.self_attn, self.mlp = Attention(heads=4, width=32), Mlp(128, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.self_attn(x).transpose(1, 2).flatten(2))


def test_two_products_for_a_group_and_nothing_else_changes(tmp_path: Path) -> None:
    x, engines = torch.randn(2, 64, 128), []
    for steps in ("{algorithm: max}", "{algorithm: svdquant, rank: 16}"):
        chosen = qcompile.load_recipe("nvfp4_fp8_attention", [f"calibration=[{steps}]"])
        program = qcompile.quantize(Block(), (x,), recipe=chosen, calibration=[x], progress=False)
        path = tmp_path / f"{len(engines)}.onnx"
        assert all(check.passed for check in qcompile.export_onnx(program, path).checks)
        engines.append(qcompile.build_engine(path, target="sm120", progress=False))
    plain, low_rank = engines
    assert (plain.gemms["fp4"], plain.attention.fp8, plain.low_rank) == (3, 1, 0)
    assert (low_rank.gemms["fp4"], low_rank.attention, low_rank.precisions) == (3, plain.attention, plain.precisions)
    assert (low_rank.low_rank, low_rank.gemms["half"]) == (6, 6)  # q, k and v have two together
    assert low_rank.kernels <= plain.kernels + 6
    gaps = {gap.reason for gap in low_rank.not_low_precision}
    assert gaps == {"ran in half: the low-rank part of a quantized weight, which is not quantized"}
    assert type(low_rank).from_json(low_rank.to_json()) == low_rank
