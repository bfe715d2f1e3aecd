"""The table of fused attention kernels against the builder's layer list, on both sides of each of its limits."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile
from passes.capabilities import FUSED_ATTENTION

pytest.importorskip("tensorrt_rtx", reason="engines are built with it: pip install 'qcompile[tensorrt-rtx]'")

RECIPES = {"fp8": "fp8", "int8": "int8_attention"}


class Cross(nn.Module):
    """Queries of `x` attend to `y`, four heads of `width`; `gate` stands between the attention and its projection."""

    def __init__(self, width: int, *, gate: bool = False) -> None:
        super().__init__()
        self.width, self.gate = width, gate
        self.q, self.k, self.v = (nn.Linear(64, 4 * width) for _ in range(3))
        self.o = nn.Linear(4 * width, 64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            layer(t).unflatten(-1, (4, self.width)).transpose(1, 2)
            for layer, t in ((self.q, x), (self.k, y), (self.v, y))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.o(out * x.sigmoid().mean(-1, keepdim=True) if self.gate else out)


def quantized(
    module: nn.Module, queries: int, keys: int, fmt: str, dtype: torch.dtype = torch.float16
) -> torch.export.ExportedProgram:
    inputs = torch.randn(1, queries, 64), torch.randn(1, keys, 64)
    return qcompile.quantize(
        module.eval(), inputs, recipe=RECIPES[fmt], calibration=[inputs], dtype=dtype, progress=False
    )


def fused(program: torch.export.ExportedProgram, fmt: str, folder: Path) -> tuple[int, int]:
    """(attentions that the report counts as quantized, those that the engine runs in `fmt`), on both targets alike."""
    path = folder / "attention.onnx"
    report = qcompile.export_onnx(program, path)
    found = {
        getattr(qcompile.build_engine(path, target=target, progress=False).attention, fmt)
        for target in ("sm89", "sm120")
    }
    assert len(found) == 1
    assert report.coverage["attention"][0] or [d.reason for d in report.declined if "for TensorRT" in d.reason]
    return report.coverage["attention"][0], found.pop()


LIMITS = {
    "fp8": [
        (64, 31, 32),
        (64, 32, 32),
        (2, 32, 32),
        (1, 64, 32),
        (64, 64, 256),
        (64, 64, 257),
        (31, 31, 64),
        (33, 33, 64),
    ],
    "int8": [
        *((2, 64, 32), (1, 64, 32), (64, 1, 32), (64, 512, 32), (64, 513, 32)),
        *((64, 64, 16), (64, 64, 24), (64, 64, 64), (64, 64, 48), (64, 64, 128)),
    ],
}


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    ("fmt", "queries", "keys", "width"), [(fmt, *sizes) for fmt, limits in LIMITS.items() for sizes in limits]
)
def test_what_the_report_claims_the_engine_does(fmt: str, queries: int, keys: int, width: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    claimed, ran = fused(quantized(Cross(width), queries, keys, fmt), fmt, tmp_path)
    assert claimed == ran
    kernel = FUSED_ATTENTION[fmt]
    assert ran == (kernel.unfit_width(width) is None and kernel.unfit_length(queries, keys) is None)


@pytest.mark.everyday(4)
@pytest.mark.parametrize(
    ("fmt", "dtype", "gate"),
    [*itertools.product(("fp8", "int8"), (torch.float16, torch.float32, torch.bfloat16), (False, True))],
)
def test_what_reads_it_next_decides(fmt: str, dtype: torch.dtype, gate: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    claimed, ran = fused(quantized(Cross(32, gate=gate), 64, 64, fmt, dtype), fmt, tmp_path)
    assert claimed == ran == (not gate or str(dtype).removeprefix("torch.") not in FUSED_ATTENTION[fmt].reader)


@pytest.mark.everyday(2)
@pytest.mark.parametrize(
    ("fmt", "queries", "keys", "width", "said"),
    [
        ("int8", 64, 64, 48, "head dimension 48, and fused INT8 attention takes 16, 32, 64"),
        ("fp8", 64, 16, 32, "as short as 16, and fused FP8 attention needs at least 32"),
        ("int8", 64, 513, 32, "as long as 513, and fused INT8 attention takes at most 512"),
        ("int8", 1, 64, 32, "it can have 1 query, and fused INT8 attention needs at least 2"),
    ],
)
def test_a_portable_file_keeps_its_quantizers_and_the_engine_report_says_why(
    fmt: str, queries: int, keys: int, width: int, said: str, tmp_path: Path
) -> None:
    program = quantized(Cross(width), queries, keys, fmt)
    report = qcompile.export_onnx(program, tmp_path / "portable.onnx", target="portable")
    assert report.coverage["attention"] == (1, 1)
    engine = qcompile.build_engine(tmp_path / "portable.onnx", target="sm89", progress=False)
    assert [said in gap.reason for gap in engine.not_low_precision if gap.kind == "attention"] == [True]
    assert engine.attention.low_precision == 0
    if keys < 32 and fmt == "fp8":
        assert "export with at least 32 tokens (" in engine.notices[-1]


def test_the_reader_is_named_where_it_stands_in_the_way(tmp_path: Path) -> None:
    program = quantized(Cross(32, gate=True), 64, 64, "int8")
    qcompile.export_onnx(program, tmp_path / "portable.onnx", target="portable")
    engine = qcompile.build_engine(tmp_path / "portable.onnx", target="sm89", progress=False)
    assert ["next is a quantizer" in gap.reason for gap in engine.not_low_precision] == [True]
    assert engine.notices == []
