"""Which operators torch computes in float32 and float64 alone."""

from __future__ import annotations

import re

from torch.fx import Node

from passes.traits import operator_name

__all__ = ["WITHOUT_HALF", "lacks_half_kernel"]

_NAMES = """
    stft istft _fft_r2c _fft_c2r _fft_c2c
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa avg_pool3d
    cholesky cholesky_inverse cholesky_solve linalg_cholesky linalg_cholesky_ex
    det logdet slogdet linalg_det linalg_slogdet _linalg_det _linalg_slogdet
    inverse linalg_inv linalg_inv_ex linalg_pinv linalg_tensorinv linalg_matrix_power
    linalg_eig linalg_eigvals linalg_eigh linalg_eigvalsh _linalg_eigh
    svd linalg_svd linalg_svdvals _linalg_svd linalg_cond linalg_matrix_norm linalg_matrix_rank linalg_norm
    qr geqrf ormqr linalg_qr linalg_householder_product
    linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve linalg_ldl_factor linalg_ldl_factor_ex
    triangular_solve linalg_solve linalg_solve_ex _linalg_solve_ex linalg_solve_triangular linalg_tensorsolve
    linalg_vander cdist _cdist_forward pdist _pdist_forward quantile nanquantile histogram
    special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_erfcx
    special_log_ndtr special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
    special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1
    special_spherical_bessel_j0 special_zeta
"""
WITHOUT_HALF = frozenset(_NAMES.split())
"""Operators that raise in float16 and in bfloat16 on a CPU, for some arguments at least; on a GPU most do."""

_FFT = re.compile(r"fft_i?h?r?fft[2n]?")  # not fft_fftshift, which moves elements, and fft_fftfreq


def lacks_half_kernel(node: Node) -> bool:
    """Whether torch has no kernel of `node`'s operator for float16 and bfloat16."""
    name = operator_name(node)
    return name in WITHOUT_HALF or _FFT.fullmatch(name) is not None
