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
from passes.formats import FORMATS, FP8, FP8_PER_TOKEN, INT8, Format, get_format

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
    assert fmt.encode(torch.tensor([fmt.max, fmt.min])).float().tolist() == [fmt.max, fmt.min]
    assert get_format(fmt.name) is fmt


def test_per_token_is_fp8_with_a_scale_for_the_last_axis() -> None:
    assert (FP8.block, FP8_PER_TOKEN.block) == ((), (None,))
    assert FP8_PER_TOKEN.storage is FP8.storage


def test_an_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(PassError, match=r"'fp7'.*fp8.*int8") as error:
        get_format("fp7")
    assert isinstance(error.value, QCompileError)
