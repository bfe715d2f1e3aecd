"""Codes of every format against ml_dtypes and the ONNX reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from passes.errors import PassError, QCompileError
from passes.formats import (
    FORMATS,
    FP8,
    FP8_1X128,
    FP8_128X128,
    FP8_PER_TOKEN,
    INT4_COLUMNS,
    INT4_GROUPS,
    INT8,
    NVFP4,
    Format,
    get_format,
)
from passes.ir import block_numbers, dequantize, quantize
from tests.nvfp4 import VALUES, e2m1, unpacked

ONNX_TYPE = {"fp8": TensorProto.FLOAT8E4M3FN, "fp8_per_token": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8}
floats = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(width=32))
# the reference rounds through int32, which wraps beyond 2^31
finite = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(-(2.0**30), 2.0**30, width=32)
)


def onnx_codes(x: np.ndarray, fmt: Format) -> np.ndarray:
    """`QuantizeLinear(x, 1)` of the ONNX reference, saturating."""
    quantize = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], saturate=1)
    zero = helper.make_node("Constant", [], ["zero"], value=helper.make_tensor("z", ONNX_TYPE[fmt.name], [], [0]))
    graph = helper.make_graph(
        [zero, quantize],
        "quantize",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "scale")],
        [helper.make_tensor_value_info("y", ONNX_TYPE[fmt.name], None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    (y,) = ReferenceEvaluator(model).run(None, {"x": x, "scale": np.float32(1)})
    return y.view(np.uint8)


def codes(x: np.ndarray, fmt: Format) -> np.ndarray:
    return fmt.encode(torch.from_numpy(x)).view(torch.uint8).numpy()


@given(floats)
def test_fp8_codes_are_those_of_ml_dtypes(x: np.ndarray) -> None:
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert (codes(x, FP8) & 0x7F)[np.isnan(x)].tolist() == [0x7F] * int(np.isnan(x).sum())  # NaN of either sign
    np.testing.assert_array_equal(codes(x, FP8)[~np.isnan(x)], expected[~np.isnan(x)])


@pytest.mark.parametrize("fmt", [FP8, INT8], ids=lambda f: f.name)
@given(x=finite)
def test_codes_are_those_of_onnx(fmt: Format, x: np.ndarray) -> None:
    np.testing.assert_array_equal(codes(x, fmt), onnx_codes(x, fmt))


def test_every_fp8_code_and_every_tie_rounds_as_ml_dtypes() -> None:
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    for x in (values, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, -np.float32(np.inf))):
        np.testing.assert_array_equal(codes(x, FP8), x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@pytest.mark.parametrize(
    ("value", "code"),
    [(126.5, 126), (127.5, 127), (1e30, 127), (-128.4, -128), (float("-inf"), -128), (0.5, 0), (1.5, 2)],
)
def test_int8_rounds_ties_to_even_and_saturates(value: float, code: int) -> None:
    assert INT8.encode(torch.tensor(value)).item() == code


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_the_largest_value_is_a_code_of_its_own(fmt: Format) -> None:
    assert fmt.decode(fmt.encode(torch.tensor([fmt.max, fmt.min]))).tolist() == [fmt.max, fmt.min]
    assert get_format(fmt.name) is fmt


def test_per_token_is_fp8_with_a_scale_for_the_last_axis() -> None:
    assert (FP8.block, FP8_PER_TOKEN.block) == ((), (None,))
    assert FP8_PER_TOKEN.storage is FP8.storage


pairs = hnp.arrays(
    np.float32, st.sampled_from([(2,), (3, 4), (1, 2, 6)]), elements=st.floats(width=32, allow_nan=False)
)


@given(st.one_of(pairs, pairs.map(lambda x: np.clip(x, -8, 8))))
def test_nvfp4_codes_are_those_of_ml_dtypes(x: np.ndarray) -> None:
    packed = codes(x, NVFP4)
    assert packed.shape == (*x.shape[:-1], x.shape[-1] // 2)
    np.testing.assert_array_equal(unpacked(packed), e2m1(x))
    np.testing.assert_array_equal(NVFP4.decode(torch.from_numpy(packed)).numpy(), VALUES[e2m1(x)])


def test_every_nvfp4_code_and_every_tie_rounds_as_ml_dtypes() -> None:
    values = np.unique(VALUES)
    ties = (values[1:] + values[:-1]) / 2
    around = [np.nextafter(ties, np.float32(limit)) for limit in (np.inf, -np.inf)]
    extremes = np.array([5, 6.5, 7, 1e38, 1e-45, np.inf], np.float32)
    x = np.concatenate([values, ties, *around, extremes, -extremes])
    np.testing.assert_array_equal(unpacked(codes(np.repeat(x, 2), NVFP4))[::2], e2m1(x))


def test_the_even_index_is_the_low_nibble() -> None:
    """[0.5, -6] is 0xf1 in checkpoints, in ONNX and in torch's packed type."""
    assert NVFP4.encode(torch.tensor([0.5, -6.0])).tolist() == [0xF1]
    assert NVFP4.decode(torch.tensor([0xF1], dtype=torch.uint8)).tolist() == [0.5, -6.0]
    onnx_order = helper.make_tensor("t", TensorProto.FLOAT4E2M1, [2], [0.5, -6.0]).int32_data
    assert list(onnx_order) == [0xF1]


def test_minus_zero_is_zero_and_a_small_negative_number_keeps_its_sign() -> None:
    """As Model Optimizer writes them; it keeps exports equal byte by byte."""
    assert NVFP4.encode(torch.tensor([-0.0, -0.1])).tolist() == [0x80]


def test_every_byte_survives_a_round_trip() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    again = NVFP4.encode(NVFP4.decode(packed))
    low, high = (torch.where(nibble == 8, 0, nibble) for nibble in (packed & 15, packed >> 4))  # -0.0
    assert torch.equal(again, low | high << 4)


def test_nvfp4_has_two_levels_of_scales() -> None:
    assert (NVFP4.block, NVFP4.scale, NVFP4.global_max) == ((16,), FP8, 2688.0)
    assert (FP8.global_max, INT8.global_max) == (448.0, 127.0)
    scale = torch.tensor([[1.0, 2.0]])
    assert NVFP4.per_element(scale, (1, 32)).tolist() == [[1.0] * 16 + [2.0] * 16]
    assert FP8.per_element(scale, (1, 32)) is scale


@pytest.mark.parametrize("width", [1, 127, 128, 129, 256, 257, 300])
@pytest.mark.parametrize("rows", [1, 128, 200])
def test_each_element_has_the_scale_of_its_block(rows: int, width: int) -> None:
    """The last block of an axis can be smaller than the others."""
    row, column = torch.arange(rows) // 128, torch.arange(width) // 128
    for fmt, index, counts in (
        (FP8_1X128, torch.arange(rows), [-(-width // 128)]),
        (FP8_128X128, row, [-(-rows // 128), -(-width // 128)]),
    ):
        assert fmt.blocks((5, rows, width)) == counts
        lead = () if fmt is FP8_128X128 else (rows,)
        scale = torch.randn(2, *lead, *counts)
        want = scale[:, index][:, :, column]
        assert torch.equal(fmt.per_element(scale, (2, rows, width)), want)
    assert torch.equal(FP8.per_element(want, (rows, width)), want)  # broadcasts as it is


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(PassError, match=r"'fp7'.*fp8.*int8") as error:
        get_format("fp7")
    assert isinstance(error.value, QCompileError)


@pytest.mark.parametrize("fmt", [*INT4_GROUPS.values(), *INT4_COLUMNS.values()], ids=lambda f: f.name)
@given(x=hnp.arrays(np.float32, (4, 128), elements=st.floats(-(2.0**30), 2.0**30, width=32)))
def test_int4_codes_are_those_of_onnx_and_ml_dtypes(fmt: Format, x: np.ndarray) -> None:
    """Packed as a file has them, and a byte for each; scales of blocks along one axis."""
    axis = 0 if fmt in INT4_COLUMNS.values() else 1
    x = np.ascontiguousarray(x.T) if axis == 0 else x
    scale = block_numbers(torch.from_numpy(x), fmt)
    made = quantize(torch.from_numpy(x), scale, format=fmt.name)
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node(
                    "QuantizeLinear",
                    ["x", "s"],
                    ["q"],
                    output_dtype=TensorProto.INT4,
                    **(blocks := {"axis": axis, "block_size": max(fmt.sizes)}),
                ),
                helper.make_node("DequantizeLinear", ["q", "s"], ["y"], **blocks),
            ],
            "int4",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "s")],
            [helper.make_tensor_value_info("q", TensorProto.INT4, None), helper.make_tensor_value_info("y", 1, None)],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    q, y = ReferenceEvaluator(model).run(None, {"x": x, "s": scale.numpy()})
    assert q.dtype == ml_dtypes.int4
    expected = q.astype(np.int8)
    if fmt.packed:
        nibbles = expected.view(np.uint8) & 15
        expected = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    np.testing.assert_array_equal(made.numpy().view(np.uint8), expected.view(np.uint8))
    back = dequantize(made, scale, format=fmt.name, dtype=torch.float32)
    np.testing.assert_array_equal(back.numpy(), y)


def test_every_byte_of_int4_is_its_two_numbers() -> None:
    packed = np.arange(256, dtype=np.uint8)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(-1).astype(np.uint8).view(ml_dtypes.int4)
    decoded = INT4_GROUPS[32].decode(torch.from_numpy(packed))
    np.testing.assert_array_equal(decoded.numpy(), values.astype(np.float32))
    assert torch.equal(INT4_GROUPS[32].encode(decoded), torch.from_numpy(packed))
