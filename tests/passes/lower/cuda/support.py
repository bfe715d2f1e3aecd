"""What tests of the lowerings for CUDA share: quantized graphs, and matrix products as torch and cuBLAS define them.

No GPU is wanted: `emulated` runs the products in float64, from the layouts that `ScaledBlas.cpp` of torch checks and
cuBLAS documents, and fails where they would; `trace` runs a graph on fake CUDA tensors, with torch's own checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter

from passes import testing
from passes.fold.weights import FoldWeights
from passes.graph import aten
from passes.lower.device import Device
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites

Array = npt.NDArray[Any]
AMPERE, ADA, HOPPER, BLACKWELL = (Device("cuda", capability) for capability in ((8, 0), (8, 9), (9, 0), (10, 0)))
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def quantized(
    module: nn.Module, *inputs: Tensor, weight: Quantizer | None, input: Quantizer | None, **options: Any
) -> GraphModule:
    """`module` with its linear layers quantized so, weights as codes."""
    gm = testing.graph_of(module, *inputs, **options)
    wanted = {"weight": weight, "input": input}
    chosen = {site: wanted.get(site.operand) for site in find_sites(gm)}
    InsertQdq({site: quantizer for site, quantizer in chosen.items() if quantizer is not None})(gm)
    FoldWeights()(gm)
    return gm


def decode(codes: Tensor) -> Array:
    """FP8 codes, or bytes of two FP4 codes, in float64."""
    data = codes.view(torch.uint8).numpy()
    if codes.dtype == torch.float8_e4m3fn:
        return data.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.stack([E2M1[data & 15], E2M1[data >> 4]], -1).reshape(*data.shape[:-1], -1)


def fp8(x: Tensor | Array, scale: Tensor | Array) -> Array:
    """What FP8 makes of `x` with `scale`, in float64."""
    values, factor = (np.asarray(t.detach().float()) if isinstance(t, Tensor) else t for t in (x, scale))
    codes = np.clip(values.astype(np.float32) / factor.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    result: Array = codes.astype(np.float64) * factor.astype(np.float64)
    return result


def _per_element(scale: Array, shape: tuple[int, int]) -> Array:
    rows, columns = (-(-size // count) for size, count in zip(shape, scale.shape, strict=True))
    result: Array = scale.repeat(rows, 0).repeat(columns, 1)[: shape[0], : shape[1]]
    return result


def _tiles(scale: Tensor, rows: int, blocks: int) -> Array:
    """Scales `[rows, blocks]` out of tiles of 128 x 4, as the documentation of cuBLAS counts them."""
    columns = -(-blocks // 4)
    assert scale.numel() == -(-rows // 128) * columns * 512 and scale.is_contiguous()
    flat = decode(scale.reshape(-1))
    r, b = np.meshgrid(np.arange(rows), np.arange(blocks), indexing="ij")
    tile = (r // 128) * columns + b // 4
    result: Array = flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + b % 4]
    return result


def _scales(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> tuple[Array, Array]:
    """Scales for each element of a `[M,K]` and b `[N,K]`; the first form that fits, as in torch."""
    rows, columns, width = a.shape[0], b.shape[0], a.shape[1]
    if a.dtype == torch.float4_e2m1fn_x2:
        blocks = width * 2 // 16
        each = [np.repeat(_tiles(s, n, blocks), 16, 1) for s, n in ((scale_a, rows), (scale_b, columns))]
        return each[0], each[1]
    assert scale_a.dtype == scale_b.dtype == torch.float32
    if scale_a.numel() == scale_b.numel() == 1:
        return scale_a.double().numpy(), scale_b.double().numpy()
    blocks = -(-width // 128)
    of_b = scale_b.t()
    if scale_a.shape == (rows, 1) and of_b.shape == (columns, 1):
        assert scale_a.is_contiguous() and of_b.is_contiguous()
        return scale_a.double().numpy(), of_b.double().numpy()
    assert scale_a.shape == (rows, blocks) and scale_a.stride() == (1, rows)
    assert rows % 4 == 0, "cuBLAS reads columns of scales in multiples of four"
    if of_b.shape == (-(-columns // 128), blocks):
        assert of_b.stride()[1] == 1 and blocks % 4 == 0, "cuBLAS reads rows of blocks in multiples of four"
        b_values = scale_b.t().double().numpy().repeat(128, 0).repeat(128, 1)[:columns, :width]
    else:
        assert of_b.shape == (columns, blocks) and of_b.stride() == (1, columns) and columns % 4 == 0
        b_values = of_b.double().numpy().repeat(128, 1)[:, :width]
    return scale_a.double().numpy().repeat(128, 1)[:, :width], b_values


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    scale_result: None,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """`aten._scaled_mm` of CUDA in float64, with its checks."""
    b = b.t()
    assert a.is_contiguous() and b.is_contiguous() and a.shape[1] % 16 == 0 and b.shape[0] % 16 == 0
    assert bias is None or bias.dtype == out_dtype != torch.float32
    assert not use_fast_accum or a.dtype == torch.float8_e4m3fn
    of_a, of_b = _scales(a, b, scale_a, scale_b)
    result = torch.from_numpy((decode(a) * of_a) @ (decode(b) * of_b).T)
    return (result if bias is None else result + bias.double()).to(out_dtype)


def scaled_grouped_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *args: Any) -> Tensor:
    """`aten._scaled_grouped_mm` of CUDA on three axes in float64, with its checks."""
    assert args[:3] == (None, None, None) and args[3] == torch.bfloat16
    b = b.transpose(-1, -2)
    assert a.is_contiguous() and b.is_contiguous() and a.shape[0] == b.shape[0]
    assert scale_a.shape == a.shape[:2] and scale_b.shape == b.shape[:2]
    assert scale_a.dtype == scale_b.dtype == torch.float32 and scale_a.stride(-1) == scale_b.stride(-1) == 1
    left, right = (decode(x) * s.double().numpy()[..., None] for x, s in ((a, scale_a), (b, scale_b)))
    return torch.from_numpy(left @ right.swapaxes(-1, -2)).to(torch.bfloat16)


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """`aten._int_mm` of CUDA, with its checks."""
    assert a.dtype == b.dtype == torch.int8 and a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
    return torch.from_numpy(a.numpy().astype(np.int32) @ b.numpy().astype(np.int32))


_PRODUCTS = {
    aten._scaled_mm.default: scaled_mm,
    aten._scaled_grouped_mm.default: scaled_grouped_mm,
    aten._int_mm.default: int_mm,
}


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products of CUDA in `passes.testing.run`."""
    original = Interpreter.call_function

    def call(self: Interpreter, target: Any, args: Any, kwargs: Any) -> Any:
        return original(self, _PRODUCTS.get(target, target), args, kwargs)

    monkeypatch.setattr(testing.CheckedInterpreter, "call_function", call)
    yield


class _OnCuda(Interpreter):
    """Runs a graph on fake CUDA tensors."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _on_cuda(super().get_attr(target, args, kwargs))


def _on_cuda(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def trace(gm: GraphModule, *inputs: Tensor | None) -> list[Tensor]:
    """The fake outputs of `gm` on a CUDA device, with the checks that torch makes of shapes, strides and dtypes."""
    with FakeTensorMode(), torch.no_grad():
        results = _OnCuda(gm).run(*(None if x is None else _on_cuda(x) for x in inputs))
    return [result for result in torch.utils._pytree.tree_leaves(results) if isinstance(result, Tensor)]
