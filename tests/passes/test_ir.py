"""The operators of the IR against ONNX, numpy and torch's own attention; fakes with opcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from passes.formats import FP8, FP8_PER_TOKEN, INT8, INT8_PER_TOKEN, Format, get_format
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE

SCALAR = torch.tensor(0.03)
HALF_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def codes(shape: tuple[int, ...], fmt: str = "fp8") -> Tensor:
    return get_format(fmt).encode(torch.randn(shape) * 50)


def opcheck(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(isinstance(a, Tensor) and a.dtype is torch.float8_e4m3fn for a in args):
        tests.append("test_schema")  # its comparison of arguments before and after has no float8 kernel in torch 2.13
    torch.library.opcheck(op, args, kwargs, test_utils=tests)


SCALES = [SCALAR, torch.rand(6, 1) + 0.1]


@pytest.mark.everyday(4)
@pytest.mark.parametrize("fmt", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("scale", SCALES, ids=["tensor", "channel"])
def test_opcheck_of_quantize_and_dequantize(fmt: str, dtype: torch.dtype, scale: Tensor) -> None:
    x = torch.randn(8, 6, dtype=dtype).t()  # not contiguous
    opcheck(QUANTIZE, (x, scale), {"format": fmt})
    opcheck(DEQUANTIZE, (codes((6, 8), fmt), scale), {"format": fmt, "dtype": dtype})


@pytest.mark.parametrize("fmt", ["fp8", "fp8_per_token", "int8"])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_opcheck_of_dynamic_quantize(fmt: str, dtype: torch.dtype) -> None:
    opcheck(DYNAMIC_QUANTIZE, (torch.randn(2, 3, 4, dtype=dtype), None), {"format": fmt})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_opcheck_of_attention(masked: bool, causal: bool) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 6)
    mask = torch.randn(5, 7) if masked else None
    opcheck(ATTENTION, (q, k, v, mask, torch.tensor(1 / 448)), {"is_causal": causal, "format": "fp8"})


# --- quantize and dequantize ---------------------------------------------------------------------------------------

scales = st.floats(2.0**-20, 2.0**20, width=32)
floats = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=st.floats(width=32, allow_nan=False))


@given(floats, scales)
def test_fp8_round_trip_is_that_of_ml_dtypes(x: np.ndarray, scale: float) -> None:
    q = QUANTIZE(torch.from_numpy(x), torch.tensor(scale), format="fp8")
    expected = np.clip(x / np.float32(scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(q.view(torch.uint8).numpy(), expected.view(np.uint8))
    back = DEQUANTIZE(q, torch.tensor(scale), format="fp8", dtype=torch.float32)
    np.testing.assert_array_equal(back.numpy(), expected.astype(np.float32) * np.float32(scale))


@given(floats, scales)
def test_int8_round_trip_is_that_of_numpy(x: np.ndarray, scale: float) -> None:
    q = QUANTIZE(torch.from_numpy(x), torch.tensor(scale), format="int8")
    expected = np.clip(np.rint(x / np.float32(scale)), -128, 127)
    np.testing.assert_array_equal(q.numpy(), expected.astype(np.int8))
    back = DEQUANTIZE(q, torch.tensor(scale), format="int8", dtype=torch.float32)
    np.testing.assert_array_equal(back.numpy(), expected.astype(np.float32) * np.float32(scale))


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_the_division_is_done_in_float32(dtype: torch.dtype) -> None:
    x, scale = torch.randn(1000, dtype=dtype), torch.tensor(0.0317, dtype=dtype)
    expected = (x.float().numpy() / scale.float().numpy()).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(QUANTIZE(x, scale, format="fp8").view(torch.uint8).numpy(), expected.view(np.uint8))


def test_nan_stays_and_infinity_saturates() -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    q = QUANTIZE(x, torch.tensor(0.5), format="fp8")
    back = DEQUANTIZE(q, torch.tensor(0.5), format="fp8", dtype=torch.float16)
    torch.testing.assert_close(back, torch.tensor([torch.nan, 224, -224, 0, 0], dtype=torch.float16), equal_nan=True)


# --- dynamic_quantize ----------------------------------------------------------------------------------------------

tokens = hnp.arrays(np.float32, (3, 4), elements=st.floats(-6e4, 6e4, width=16))


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("fmt", ["fp8", "fp8_per_token", "int8"])
@given(x=tokens)
def test_dynamic_quantize_is_close_for_every_finite_token(dtype: torch.dtype, fmt: str, x: np.ndarray) -> None:
    tensor = torch.from_numpy(x).to(dtype)
    q, scale = DYNAMIC_QUANTIZE(tensor, None, format=fmt)
    assert scale.dtype is torch.float32
    assert scale.shape == ((3, 1) if fmt == "fp8_per_token" else ())
    assert bool((scale > 0).all())
    back = DEQUANTIZE(q, scale, format=fmt, dtype=torch.float32)
    amax = tensor.float().abs().amax(-1, keepdim=True) if fmt == "fp8_per_token" else tensor.float().abs().amax()
    # half a step at the largest magnitude (1/16 for FP8, 1/254 for INT8), the rounding of the scale, tiny tokens
    step = 1 / 16 if fmt != "int8" else 1 / 254
    assert bool(((back - tensor.float()).abs() <= amax * (step + 2**-20) + 2**-15).all())


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_a_token_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=dtype)
    q, scale = DYNAMIC_QUANTIZE(x, None, format="fp8_per_token")
    torch.testing.assert_close(DEQUANTIZE(q, scale, format="fp8_per_token", dtype=dtype), x, rtol=1e-2, atol=0)


MEASURED = (FP8, FP8_PER_TOKEN, INT8, INT8_PER_TOKEN)


@pytest.mark.parametrize("fmt", MEASURED, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_the_floor_of_a_scale_that_is_measured(dtype: torch.dtype, fmt: Format) -> None:
    """What is smaller is divided as if it were the amax: its reciprocal is finite in its dtype."""
    least = np.float32(2.0**-14 if dtype == torch.float16 else 2.0**-100)
    for value in (0.0, 5e-8 if dtype == torch.float16 else 1e-35):
        q, scale = DYNAMIC_QUANTIZE(torch.full((1, 4), value, dtype=dtype), None, format=fmt.name)
        assert scale.flatten().tolist() == [least / np.float32(fmt.max)]
        back = DEQUANTIZE(q, scale, format=fmt.name, dtype=torch.float32)
        assert bool((back - value).abs().le(float(scale) / 2).all())


@pytest.mark.parametrize("fmt", MEASURED, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", HALF_TYPES)
@given(exponent=st.integers(-24, 15), seed=st.integers(0, 99))
def test_no_finite_number_becomes_an_infinity(dtype: torch.dtype, fmt: Format, exponent: int, seed: int) -> None:
    """Tokens of every size up to 65504, against ml_dtypes: what has the largest magnitude comes back as it was."""
    x = np.random.default_rng(seed).uniform(-1, 1, (3, 16)).astype(np.float32) * np.float32(2.0**exponent)
    x[0, :2] = 65504, -65504
    tensor = torch.from_numpy(x).to(dtype)
    x = tensor.float().numpy()
    q, scale = DYNAMIC_QUANTIZE(tensor, None, format=fmt.name)
    back = DEQUANTIZE(q, scale, format=fmt.name, dtype=dtype).float().numpy()
    amax = np.abs(x).max(axis=-1 if fmt.block else None, keepdims=bool(fmt.block))
    least = np.float32(2.0**-14 if dtype == torch.float16 else 2.0**-100)
    own = np.maximum(amax, least) / np.float32(fmt.max)
    if fmt.integer:
        codes = np.clip(np.rint(x / own), -128, 127)
    else:
        codes = np.clip(x / own, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = torch.from_numpy(codes * own).to(dtype).float().numpy()
    np.testing.assert_array_equal(back, expected)
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back[0, :2], x[0, :2], rtol=1e-6)


@pytest.mark.parametrize("fmt", MEASURED, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)], ids=str)
def test_nothing_to_measure(fmt: Format, shape: tuple[int, ...]) -> None:
    q, scale = DYNAMIC_QUANTIZE(torch.empty(shape), None, format=fmt.name)
    assert (q.shape, scale.shape) == (shape, (*shape[:-1], 1) if fmt.block else ())
    assert bool((scale > 0).all())


def test_a_nan_stays_in_its_token() -> None:
    x = torch.tensor([[torch.nan, 1.0], [1.0, -2.0]])
    q, scale = DYNAMIC_QUANTIZE(x, None, format="fp8_per_token")
    back = DEQUANTIZE(q, scale, format="fp8_per_token", dtype=torch.float32)
    assert back[0].isnan().all()
    assert back[1].isfinite().all()


def test_a_global_scale_belongs_to_a_format_with_two_levels() -> None:
    with pytest.raises(ValueError, match="fp8 has no global scale"):
        DYNAMIC_QUANTIZE(torch.ones(2), torch.tensor(1.0), format="fp8")
    with pytest.raises(ValueError, match="nvfp4 needs a global scale"):
        DYNAMIC_QUANTIZE(torch.ones(16), None, format="nvfp4")


# --- attention -----------------------------------------------------------------------------------------------------


def attention_oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> np.ndarray:
    """`QDQ(softmax(q k^T + mask)) v` in numpy, float64 but for the codes."""
    q64, k64, v64 = (t.double().numpy() for t in (q, k, v))
    k64, v64 = (t.repeat(q64.shape[1] // t.shape[1], axis=1) for t in (k64, v64))
    scores = np.einsum("bhqd,bhkd->bhqk", q64, k64)
    if causal:
        i, j = np.indices(scores.shape[-2:])
        scores = np.where(j <= i, scores, -np.inf)
    if mask is not None:
        scores = scores + mask.double().numpy()
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p8 = np.clip(p.astype(np.float32) / np.float32(scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return np.einsum("bhqk,bhkd->bhqd", p8.astype(np.float64) * scale, v64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_against_numpy(causal: bool, masked: bool, kv_heads: int) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, 6)
    mask = torch.randn(2, 1, 5, 7) if masked else None
    got = ATTENTION(q, k, v, mask, torch.tensor(1 / 448), is_causal=causal, format="fp8")
    # a probability within a float32 rounding of a tie may take the other code: one step of 1/16 at most
    expected = attention_oracle(q, k, v, mask, 1 / 448, causal)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-2)
    assert np.mean(np.abs(got.numpy() - expected) < 1e-5) > 0.95


@pytest.mark.parametrize("keys", [1, 2, 8])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_attention_is_that_of_torch_where_probabilities_are_codes(keys: int, dtype: torch.dtype) -> None:
    """Equal scores give 1/keys, a power of two, which FP8 holds exactly at a scale that is one too."""
    q, k = torch.zeros(1, 2, 3, 8, dtype=dtype), torch.randn(1, 2, keys, 8, dtype=dtype)
    v = torch.randint(-8, 8, (1, 2, keys, 8)).to(dtype)
    got = ATTENTION(q, k, v, None, torch.tensor(2.0**-8), is_causal=False, format="fp8")
    torch.testing.assert_close(got, scaled_dot_product_attention(q, k, v, scale=1.0), rtol=0, atol=0)


@pytest.mark.parametrize("make", [lambda *s: torch.zeros(s), lambda *s: torch.rand(s) < 0.5], ids=["zero", "random"])
def test_attention_is_near_that_of_torch(make: Callable[..., Tensor]) -> None:
    q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    mask = make(4, 6).float() * -10
    got = ATTENTION(q * 8**-0.5, k, v, mask, torch.tensor(1 / 448), is_causal=False, format="fp8")
    torch.testing.assert_close(got, scaled_dot_product_attention(q, k, v, mask), rtol=0, atol=0.1)


def test_formats_that_are_unknown_are_refused() -> None:
    with pytest.raises(Exception, match="unknown quantization format 'nope'"):
        QUANTIZE(torch.ones(2), SCALAR, format="nope")
    assert (FP8.name, INT8.name) == ("fp8", "int8")
