"""What Torch-TensorRT gets in place of operators that it has no converter for, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.nn.functional import scaled_dot_product_attention

from qcompile.torch_tensorrt.decompose import attention, rms_norm


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.5}, {"enable_gqa": True}, {"mask": torch.randn(3, 5)}],
    ids=lambda o: next(iter(o), "plain"),
)
def test_attention(options: dict[str, Any]) -> None:
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, heads, 5, 8), torch.randn(2, heads, 5, 6)
    torch_options = {"attn_mask" if name == "mask" else name: value for name, value in options.items()}
    torch.testing.assert_close(attention(q, k, v, **options), scaled_dot_product_attention(q, k, v, **torch_options))


def test_a_row_that_is_masked_as_a_whole_is_the_mean_of_the_values_whatever_its_scores() -> None:
    """The lowest float16 and a score of -512 are -inf, which would make the row NaN."""
    q, v = torch.full((1, 1, 3, 8), 8.0).half(), torch.randn(1, 1, 3, 8).half()
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])
    found = attention(q, -q, v, mask, scale=1.0)
    expected = torch.stack([v[0, 0, 0], v[0, 0].mean(0), v[0, 0].mean(0)])
    torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("eps", [None, 1e-2])
def test_rms_norm(dtype: torch.dtype, eps: float | None) -> None:
    x, weight = torch.randn(2, 3, 8).to(dtype), torch.randn(3, 8).to(dtype)
    for w in (weight, None):
        torch.testing.assert_close(rms_norm(x, (3, 8), w, eps), torch_rms_norm(x, (3, 8), w, eps))
