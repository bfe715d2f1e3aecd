"""The arithmetic of benchmarks/gpu: rooflines, noise, samples, layouts, bars."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from benchmarks.gpu import check
from benchmarks.gpu.chips import Gemm, Machine, Peak, peak_of
from benchmarks.gpu.gemm import Problem
from benchmarks.gpu.operands import SCHEMES, _tiled
from benchmarks.gpu.rows import Row, bars
from benchmarks.gpu.timing import Clock, Samples, in_turn

H200 = Peak(bf16=1000.0, fp8=2000.0, bandwidth=5.0, nvfp4=None)
CPU = Machine(torch.device("cpu"))


def test_a_large_product_is_bound_by_its_arithmetic() -> None:
    gemm = Gemm(4096, 4096, 4096)
    assert gemm.flops == 137_438_953_472
    assert gemm.bytes("bf16") == 3 * 4096 * 4096 * 2
    assert gemm.bytes("fp8") == 4 * 4096 * 4096  # two operands of one byte, a result of two
    assert gemm.floor_seconds("bf16", H200) == pytest.approx(137.438953472e-6)
    assert gemm.floor_seconds("fp8", H200) == pytest.approx(68.719476736e-6)


def test_a_product_with_one_row_is_bound_by_the_memory() -> None:
    gemm = Gemm(1, 14336, 4096)
    assert gemm.floor_seconds("fp8", H200) == pytest.approx((14336 * 4096 + 4096 + 2 * 14336) / 5e12)
    assert gemm.floor_seconds("nvfp4", H200) is None


def test_nvfp4_counts_its_block_scales() -> None:
    assert Gemm(16, 16, 32).bytes("nvfp4") == 2 * 16 * (32 / 2 + 32 / 16) + 16 * 16 * 2


@pytest.mark.parametrize(
    ("chip", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 1978.9),
        ("NVIDIA H100 PCIe", 1512.9),
        ("NVIDIA H200", 1978.9),
        ("NVIDIA L40S", 733.0),
        ("NVIDIA L4", 242.0),
        ("NVIDIA GeForce RTX 4090", 330.3),
        ("NVIDIA B200", 4500.0),
        ("NVIDIA L40", None),
    ],
)
def test_peaks_go_by_whole_words(chip: str, fp8: float | None) -> None:
    peak = peak_of(chip)
    assert (peak and peak.fp8) == fp8


def test_names_for_files() -> None:
    assert Machine(torch.device("cuda"), "NVIDIA GeForce RTX 4090").label == "rtx_4090"
    assert CPU.label == "cpu"


def test_snr_of_known_noise() -> None:
    signal = torch.ones(1000)
    assert check.snr([signal * 1.1], [signal]) == pytest.approx(20.0, abs=1e-3)
    assert check.snr([signal, signal * 1.01], [signal, signal]) == pytest.approx(40.0, abs=1e-2)
    assert check.snr([signal], [signal]) == check.EQUAL
    assert check.snr([signal * math.nan], [signal]) == -math.inf
    assert check.snr([signal[:1]], [signal]) == -math.inf
    assert check.add_noise(30.0, 30.0) == pytest.approx(26.99, abs=0.01)
    assert check.add_noise(30.0, times=10) == pytest.approx(20.0)


def test_a_verdict_needs_the_program_and_the_model() -> None:
    torch.manual_seed(0)
    exact = torch.randn(4096)
    noise, other = torch.randn(2, 4096) * 0.03
    program = [exact + noise]
    assert not check.against_program([exact + noise + 0.01 * other], program, [exact], margin=6).faults
    # as near to the model as the program is, but not what the program computes
    (fault,) = check.against_program([exact + other], program, [exact]).faults
    assert fault.startswith("to program is")
    faults = check.against_program([exact * 1.1], program, [exact]).faults
    assert [fault.split(" is ")[0] for fault in faults] == ["to program", "to fp32"]
    assert check.against_exact([exact + noise], [exact], [exact + other]).faults == []
    assert check.against_exact([exact + 2 * noise], [exact], [exact + other]).faults
    assert check.against_bound([exact + noise], [exact], (35.0, 35.0), 4).faults == []
    assert check.against_bound([exact + 3 * noise], [exact], (35.0, 35.0), 4).faults


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_lost_scale_is_seen(scheme: object) -> None:
    problem = Problem(Gemm(32, 64, 256), CPU)
    a, b = scheme.input(problem.inputs[0]), scheme.weight(problem.weights[0])  # type: ignore[attr-defined]
    product = (a.dequantized() @ b.dequantized().t()).bfloat16()
    assert not problem.judge(product, scheme).faults  # type: ignore[arg-type]
    product[:, 7] *= 1.5
    assert problem.judge(product, scheme).faults  # type: ignore[arg-type]


def test_block_scales_in_tiles() -> None:
    """Position of row r and column c in a tile of 128 x 4: cuBLAS, "1D block scaling factors layout"."""
    scales = torch.arange(130 * 5).remainder(251).reshape(130, 5).to(torch.uint8)
    tiles = _tiled(scales.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert tiles.shape == (256 * 8,)
    for r, c in ((0, 0), (1, 0), (31, 3), (32, 1), (127, 3), (128, 4), (129, 2)):
        offset = (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
        assert tiles[(r // 128 * 2 + c // 4) * 512 + offset] == scales[r, c]


def test_copies_do_not_fit_into_the_cache() -> None:
    small, large = Gemm(1, 256, 256), Gemm(512, 512, 512)
    machine = Machine(torch.device("cpu"), l2_bytes=1 << 20)
    assert Problem(small, machine).copies == 32
    assert Problem(large, machine).copies == 8
    assert Problem(small, CPU).copies == 1


def test_ratios_are_of_the_same_round() -> None:
    slow, fast = Samples([[4.0, 4.0], [8.0, 8.0]]), Samples([[2.0], [4.0]])
    assert fast.over(slow) == 2.0
    assert slow.median == 6.0
    assert slow.quartiles() == (4.0, 8.0)


def test_variants_take_turns_in_both_orders() -> None:
    calls: list[str] = []
    runs: dict[str, Callable[[], object]] = {name: (lambda name=name: calls.append(name)) for name in "ab"}  # type: ignore[misc]
    *_, samples = in_turn(Clock(CPU), runs, rounds=2, seconds=0)
    assert [len(samples[name].rounds) for name in "ab"] == [2, 2]
    assert "".join(calls).replace("aaaa", "A").replace("bbbb", "B") == "ABBA"


def test_bars() -> None:
    def row(case: str, variant: str, ms: float, speedup: float, **facts: object) -> Row:
        return Row(case, variant, "ok", ms=ms, speedup=speedup, facts=facts)

    rows = [
        row("vit-large/64", "bf16-compile", 30, 1),
        row("vit-large/64", "qcompile-row", 21, 1.43),
        row("vit-large/64", "torchao-row", 20, 1.5),
        row("gemm/x", "scaled_mm-row", 1, 1, kind="fp8", tflops=1000.0),
        row("gemm/x", "qcompile-row", 1, 1, kind="fp8", tflops=990.0),
        row("gemm/x", "qcompile-row-bare", 1, 1, kind="fp8", tflops=890.0),
    ]
    assert [ok for _, ok in bars(rows, "NVIDIA H200")] == [True, False, False]
    assert [ok for _, ok in bars(rows, "NVIDIA L40S")] == [False, False]
    assert bars(rows, None) == []
    rows[1].status = "wrong"
    assert [text.split(":")[0] for text, _ in bars(rows, "NVIDIA H200")] == ["gemm/x"]
