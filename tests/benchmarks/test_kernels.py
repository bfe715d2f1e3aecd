"""What the benchmark of kernels calls a claim that is untrue, and a miss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from benchmarks.kernels import Row, blocks_of, differences, summary
from qcompile.engine.report import NotLowPrecision

GAPS = [
    NotLowPrecision("attention", "layers.0.attn", "not fused"),
    NotLowPrecision("gemm", "layers.0.q_proj", "ran in half"),
    NotLowPrecision("gemm", "head", "ran in half"),
]


def found(quantized: dict[str, str]) -> list[str]:
    report: Any = SimpleNamespace(quantized=quantized)
    built: Any = SimpleNamespace(not_low_precision=GAPS)
    return differences(report, built)


def test_only_what_the_report_counts_as_quantized_is_a_difference() -> None:
    assert found({}) == []
    assert found({"layers.0.attn": "fp8", "layers.0.q_proj+layers.0.k_proj": "fp8"}) == [
        "attention layers.0.attn (fp8): not fused",
        "gemm layers.0.q_proj (fp8): ran in half",
    ]


def test_two_kernels_more_for_each_block_are_no_miss() -> None:
    rows = [
        Row("a", kernels=24, half_kernels=20, blocks=2),
        Row("b", kernels=25, half_kernels=20, blocks=2),
        Row("c", kernels=30, half_error="refused"),
        Row("d", kernels=23, half_kernels=20, blocks=0, differences=["attention x (fp8): not fused"]),
        Row("e", error="the process ended"),
    ]
    assert [len(row.misses) for row in rows] == [0, 1, 0, 2, 1]
    assert summary(rows) == (
        "5 models, 3 with a half engine: median 1.200 x; more than 2 a block in 2; 1 claims untrue"
    )


class Layer(nn.Module):
    """An attention and an MLP written as a sequence, or as experts."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        mlp = [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(max(experts, 1))]
        if experts:
            self.experts = nn.ModuleList(mlp)
        else:
            self.mlp = mlp[0]


def test_a_block_is_what_repeats_and_not_what_it_is_made_of() -> None:
    stages = nn.Sequential(*(nn.Sequential(*(Layer() for _ in range(count))) for count in (2, 3)))
    assert blocks_of(nn.Sequential(nn.Conv2d(3, 8, 1), stages, nn.LayerNorm(8), nn.Linear(8, 2))) == 5
    assert blocks_of(nn.ModuleList(Layer(experts=4) for _ in range(3))) == 3
    assert blocks_of(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) == 0
