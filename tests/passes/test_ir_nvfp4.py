"""NVFP4 in the IR against an oracle in numpy and against Model Optimizer; the operators with opcheck."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from passes.ir import BATCHED_LINEAR, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE, dequantize, dynamic_quantize
from tests.nvfp4 import bits, global_scale, oracle, rounded, unpacked

G = torch.tensor(0.0007)
HALF_TYPES = (torch.float32, torch.float16, torch.bfloat16)

# rows of very different size, so that block scales hit both ends of e4m3; zero blocks among them
shapes = st.tuples(st.integers(1, 3), st.integers(1, 3).map(lambda n: 16 * n))
magnitudes = st.sampled_from([0.0, 1e-30, 1e-6, 1e-3, 1.0, 3e3])
globals_ = st.floats(2.0**-30, 2.0**10, width=32)


@st.composite
def tensors(draw: Any) -> np.ndarray:
    shape = draw(shapes)
    x = draw(hnp.arrays(np.float32, shape, elements=st.floats(-8, 8, width=32)))
    sizes = draw(hnp.arrays(np.float32, (shape[0], shape[1] // 16), elements=magnitudes.map(np.float32)))
    return x * np.repeat(sizes, 16, axis=-1)


def round_trip(x: Tensor, g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    codes, block_scales = DYNAMIC_QUANTIZE(x, g, format="nvfp4")
    scale = DEQUANTIZE(block_scales, g, format="fp8", dtype=torch.float32)
    return DEQUANTIZE(codes, scale, format="nvfp4", dtype=dtype)


@given(tensors(), globals_)
def test_codes_and_scales_are_those_of_numpy(x: np.ndarray, g: float) -> None:
    codes, scales = dynamic_quantize(torch.from_numpy(x), torch.tensor(g), format="nvfp4")
    expected_codes, expected_scales = oracle(x, g)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.float8_e4m3fn)
    np.testing.assert_array_equal(bits(scales), bits(expected_scales))
    np.testing.assert_array_equal(unpacked(codes), expected_codes)
    np.testing.assert_array_equal(round_trip(torch.from_numpy(x), torch.tensor(g)).numpy(), rounded(x, g))


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("shape", [(16,), (5, 48), (2, 3, 32), (2, 1, 2, 16)], ids=str)
def test_every_rank_and_type_is_computed_in_float32(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype)
    codes, scales = DYNAMIC_QUANTIZE(x, G, format="nvfp4")
    expected_codes, expected_scales = oracle(x.float().numpy(), G)
    np.testing.assert_array_equal(unpacked(codes), expected_codes)
    np.testing.assert_array_equal(bits(scales), bits(expected_scales))
    back = round_trip(x, G, dtype)
    assert back.dtype is dtype
    assert torch.equal(back, torch.from_numpy(rounded(x.float().numpy(), G)).to(dtype))


@pytest.mark.slow  # the import alone takes ten seconds
def test_bytes_are_those_of_model_optimizer() -> None:
    pytest.importorskip("modelopt")
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    @given(tensors(), globals_)
    def check(x: np.ndarray, g: float) -> None:
        packed, scales, _ = NVFP4QTensor.quantize(
            torch.from_numpy(x).clone(), 16, weights_scaling_factor_2=torch.tensor(g)
        )
        codes, own = dynamic_quantize(torch.from_numpy(x), torch.tensor(g), format="nvfp4")
        np.testing.assert_array_equal(bits(own), bits(scales))
        np.testing.assert_array_equal(codes.numpy(), packed._quantized_data.numpy())

    check()
    weight = torch.randn(768, 3072) * 0.02
    packed, scales, g = NVFP4QTensor.quantize(weight.clone(), 16)
    codes, own = dynamic_quantize(weight, global_scale(weight), format="nvfp4")
    assert torch.equal(g, global_scale(weight))
    assert torch.equal(codes, packed._quantized_data) and np.array_equal(bits(own), bits(scales))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_its_own_block_only(bad: float) -> None:
    x = torch.randn(3, 48)
    clean = round_trip(x, G)
    x[1, 20] = bad
    found = round_trip(x, G)
    assert torch.equal(found[:, :16], clean[:, :16]) and torch.equal(found[:, 32:], clean[:, 32:])
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    if bad == torch.inf:  # saturates, at the largest number that the two levels hold
        torch.testing.assert_close(found[1, 20], 2688 * G)
    else:
        assert bool(found[1, 16:32].isnan().all())


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("g", [1.0, 1e-8, 2.0**-126])
def test_zeros_give_zeros(dtype: torch.dtype, g: float) -> None:
    x = torch.zeros(2, 32, dtype=dtype)
    codes, scales = DYNAMIC_QUANTIZE(x, torch.tensor(g), format="nvfp4")
    assert not codes.any() and bool((scales.float() == 1).all())
    assert torch.equal(round_trip(x, torch.tensor(g), dtype), x)


def test_a_block_far_below_the_others_has_the_least_scale() -> None:
    _, scales = DYNAMIC_QUANTIZE(torch.full((1, 16), 1e-20), torch.tensor(1.0), format="nvfp4")
    assert scales.float().tolist() == [[2.0**-9]]


def test_the_largest_magnitude_is_exact() -> None:
    x = torch.randn(4, 64)
    where = x.abs().argmax()
    torch.testing.assert_close(round_trip(x, global_scale(x)).flatten()[where], x.flatten()[where], rtol=1e-6, atol=0)


# --- fakes, saving ---------------------------------------------------------------------------------------------------

FAKE = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]


@pytest.mark.everyday(2)
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("shape", [(3, 32), (2, 3, 16)], ids=str)
def test_opcheck(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=dtype)
    codes, block_scales = dynamic_quantize(x, G, format="nvfp4")
    scale = dequantize(block_scales, G, format="fp8", dtype=torch.float32)
    torch.library.opcheck(DYNAMIC_QUANTIZE, (x, G), {"format": "nvfp4"}, test_utils=FAKE)  # no schema test for float8
    torch.library.opcheck(QUANTIZE, (x, scale), {"format": "nvfp4"}, test_utils=[*FAKE, "test_schema"])
    torch.library.opcheck(DEQUANTIZE, (codes, scale), {"format": "nvfp4", "dtype": dtype}, test_utils=FAKE)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("bias", [None, torch.randn(3, 5)], ids=["", "bias"])
def test_batched_linear_is_a_linear_layer_for_each_expert(experts: int, bias: Tensor | None) -> None:
    x, weight = torch.randn(experts, 4, 16), torch.randn(3, 5, 16)
    torch.library.opcheck(BATCHED_LINEAR, (x, weight, bias), {}, test_utils=[*FAKE, "test_schema"])
    expected = [
        nn.functional.linear(x[i % experts], weight[i], None if bias is None else bias[i]) for i in range(len(weight))
    ]
    torch.testing.assert_close(BATCHED_LINEAR(x, weight, bias), torch.stack(expected))


class Chain(nn.Module):
    """A linear layer as the pipeline leaves it: both operands in NVFP4."""

    def __init__(self) -> None:
        super().__init__()
        codes, block_scales = dynamic_quantize(torch.randn(8, 32), G, format="nvfp4")
        self.codes, self.block_scales = nn.Parameter(codes, False), nn.Parameter(block_scales, False)
        self.register_buffer("g", G.clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = DEQUANTIZE(self.block_scales, self.g, format="fp8", dtype=torch.float32)
        return round_trip(x, self.g) @ DEQUANTIZE(self.codes, scale, format="nvfp4", dtype=torch.float32).t()


def test_a_program_is_saved_and_loaded_with_its_bytes() -> None:
    chain, x = Chain(), torch.randn(3, 32)
    file = io.BytesIO()
    torch.export.save(torch.export.export(chain, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert torch.equal(loaded.state_dict["codes"], chain.codes)
    for rows in (3, 7):
        x = torch.randn(rows, 32)
        assert torch.equal(loaded.module()(x), chain(x))
