"""The table of operators without a half-precision kernel: every entry raises in float16 and bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from passes.graph import aten, calls
from passes.legalize.half_kernels import WITHOUT_HALF, lacks_half_kernel
from passes.testing import blank
from passes.traits import operator_name

HALF = (torch.float16, torch.bfloat16)
Call = Callable[[Tensor], Any]

# Of a positive definite matrix `[4, 4]`; operators that are not named here take it alone.
CALLS: dict[str, Call] = {
    "stft": lambda m: aten.stft.default(m.flatten(), 8, 4, window=m.flatten()[:8], return_complex=True),
    "istft": lambda m: aten.istft.default(torch.complex(m.float(), m.float())[:3], 4, window=m[0]),
    "_fft_r2c": lambda m: aten._fft_r2c.default(m, [1], 0, True),
    "_fft_c2r": lambda m: aten._fft_c2r.default(pairs(m), [1], 0, 6),
    "_fft_c2c": lambda m: aten._fft_c2c.default(pairs(m), [1], 0, True),
    "_upsample_bilinear2d_aa": lambda m: aten._upsample_bilinear2d_aa.default(m[None, None], [2, 2], False),
    "_upsample_bicubic2d_aa": lambda m: aten._upsample_bicubic2d_aa.default(m[None, None], [2, 2], False),
    "avg_pool3d": lambda m: aten.avg_pool3d.default(m[None, None], [1, 2, 2]),
    "cholesky_solve": lambda m: aten.cholesky_solve.default(m, m),
    "linalg_pinv": lambda m: aten.linalg_pinv.atol_rtol_tensor(m),
    "linalg_tensorinv": lambda m: aten.linalg_tensorinv.default(m, 1),
    "linalg_matrix_power": lambda m: aten.linalg_matrix_power.default(m, -1),
    "linalg_matrix_norm": lambda m: aten.linalg_matrix_norm.default(m, 2),
    "linalg_norm": lambda m: aten.linalg_norm.ord_str(m, "nuc"),
    "linalg_matrix_rank": lambda m: aten.linalg_matrix_rank.atol_rtol_tensor(m),
    "ormqr": lambda m: aten.ormqr.default(m, m[0], m),
    "linalg_householder_product": lambda m: aten.linalg_householder_product.default(m, m[0]),
    "linalg_lu_solve": lambda m: aten.linalg_lu_solve.default(m, torch.arange(1, 5, dtype=torch.int32), m),
    "triangular_solve": lambda m: aten.triangular_solve.default(m, m),
    "linalg_solve": lambda m: aten.linalg_solve.default(m, m),
    "linalg_solve_ex": lambda m: aten.linalg_solve_ex.default(m, m),
    "_linalg_solve_ex": lambda m: aten._linalg_solve_ex.default(m, m),
    "linalg_solve_triangular": lambda m: aten.linalg_solve_triangular.default(m, m, upper=True),
    "linalg_tensorsolve": lambda m: aten.linalg_tensorsolve.default(m, m[0]),
    "cdist": lambda m: aten.cdist.default(m, m),
    "_cdist_forward": lambda m: aten._cdist_forward.default(m, m, 2.0, None),
    "quantile": lambda m: aten.quantile.scalar(m, 0.5),
    "nanquantile": lambda m: aten.nanquantile.scalar(m, 0.5),
    "histogram": lambda m: aten.histogram.bin_ct(m, 4),
    "special_zeta": lambda m: aten.special_zeta.default(m, m),
}


def pairs(m: Tensor) -> Tensor:
    """A complex tensor, complex32 of a half: of bfloat16 there is none, so that float16 stands for it."""
    return torch.view_as_complex(m.half().reshape(4, 2, 2)) if m.dtype in HALF else torch.complex(m, m)


@pytest.mark.parametrize("name", sorted(WITHOUT_HALF))
def test_each_entry_has_a_float32_kernel_and_none_in_half_precision(name: str) -> None:
    if not hasattr(aten, name):
        pytest.skip("gone from torch 2.15")
    call = CALLS[name] if name in CALLS else getattr(aten, name).default
    matrix = torch.eye(4) * 2 + 0.5
    call(matrix)
    if name == "istft":  # takes complex numbers: its window alone can be a half
        return
    for half in HALF:
        with pytest.raises(RuntimeError):
            call(matrix.to(half))


@pytest.mark.parametrize(
    ("name", "lacks"),
    [("fft_fft2", True), ("fft_ihfftn", True), ("fft_rfft", True), ("fft_fftshift", False), ("softmax", False)],
)
def test_fourier_transforms_are_told_from_what_moves_elements(name: str, lacks: bool) -> None:
    gm, emit, (x,) = blank(torch.randn(4, 4))
    emit(aten.softmax.int, x, -1) if name == "softmax" else emit(getattr(aten, name).default, x)
    (node,) = calls(gm.graph, *(getattr(getattr(aten, name), o) for o in getattr(aten, name).overloads()))
    assert operator_name(node) == name
    assert lacks_half_kernel(node) is lacks
