"""What multiplies what: an unknown format is multiplied by nothing, and what lowerings ask is what the table says."""

from __future__ import annotations

import pytest

from passes.capabilities import (
    CONVOLUTIONS,
    FUSED_ATTENTION,
    PRODUCTS,
    UNITS,
    WEIGHT_ONLY,
    Product,
    Units,
    converts,
    inputs_of,
    multiplies,
)
from passes.formats import FORMATS, FP8, FP8_1X128, FP8_128X128, FP8_PER_TOKEN, INT8, INT8_PER_TOKEN, NVFP4, Format
from qcompile.engine.capability import lacking

FOREIGN = Format("e5m2", "float8_e5m2", 57344.0, -57344.0)
LIKE_FP8 = Format("mine", "float8_e4m3fn", 448.0, -448.0, block=(64,))
DEVICES = [None, (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("fmt", [FOREIGN, LIKE_FP8], ids=lambda fmt: fmt.name)
def test_an_unknown_format_is_taken_for_no_other(fmt: Format) -> None:
    assert inputs_of(fmt) == () and all(fmt not in inputs_of(known) for known in FORMATS.values())
    assert not any(multiplies(device, fmt) or converts(device, fmt) for device in DEVICES)
    assert lacking(fmt.family, 120) is not None and fmt.family not in FUSED_ATTENTION


def test_four_bits_are_fp4_only_where_they_are_e2m1() -> None:
    assert NVFP4.is_fp4 and not any(fmt.is_fp4 for fmt in WEIGHT_ONLY)
    assert {fmt.family for fmt in WEIGHT_ONLY} == {"int4"}


@pytest.mark.parametrize(
    ("fmt", "from_", "below"),
    [
        *((FP8, (8, 9), None), (FP8_PER_TOKEN, (8, 9), None), (NVFP4, (10, 0), None)),
        *((FP8_1X128, (9, 0), (10, 0)), (FP8_128X128, (9, 0), (10, 0))),
        *((INT8, (8, 0), None), (INT8_PER_TOKEN, (8, 0), None)),
    ],
    ids=str,
)
def test_operators_of_torch_from_which_capability_on(
    fmt: Format, from_: tuple[int, int], below: tuple[int, int] | None
) -> None:
    for device in DEVICES:
        expected = device is not None and device >= from_ and (below is None or device < below)
        assert multiplies(device, fmt) == expected


def test_every_format_is_in_the_tables() -> None:
    assert {fmt.family for fmt in FORMATS.values()} <= set(UNITS)
    multiplied = {f for product in PRODUCTS for f in (product.weight, product.input)}
    assert multiplied | set(WEIGHT_ONLY) == set(FORMATS.values()) and multiplied.isdisjoint(WEIGHT_ONLY)


def test_what_no_operator_has() -> None:
    none = Units("X", None, "none", None, (0, 0), onnxruntime=False)
    assert not any(map(none.on, DEVICES))
    assert not Product(FP8, FP8, cuda=((9, 0), (10, 0))).on(None)


def test_convolutions_by_the_size_of_their_kernels() -> None:
    """By the layer lists: FP8 of 32 elements, one depthwise kernel more on SM120; INT8 of any size."""
    assert set(CONVOLUTIONS) == {"fp8", "int8"}
    fp8, int8 = CONVOLUTIONS["fp8"], CONVOLUTIONS["int8"]
    assert fp8.unfit((4, 8), False) is fp8.unfit((3, 3, 3), True, 89) is int8.unfit((31, 31), False) is None
    for kernel, depthwise in (((33,), False), ((7, 7), False), ((9, 9), True), ((5, 7), True)):
        assert "at most 32 elements, and this one has" in str(fp8.unfit(kernel, depthwise))
    assert fp8.unfit((7, 7), True) is fp8.unfit((7, 7), True, 120) is None
    assert "but for this one on sm120 or newer, and this one has 7x7: give it INT8" in str(fp8.unfit((7, 7), True, 89))
