"""The product of two thin matrices that comes nearest to a matrix."""

from __future__ import annotations

import torch

_SPARE = 16  # columns more than wanted, so that the last wanted ones are found as well as the first
_STEPS = 8  # what is left is within a thousandth of the least that can be, also where singular values fall slowly


def largest_part(
    matrix: torch.Tensor, rank: int, start: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, K]` -> (up `[N, rank]`, down `[rank, K]`), whose product has the largest singular values.

    Found by iterating on a subspace (Halko et al. 2011), as the whole decomposition of a weight of 4096 x 14336 takes
    minutes; where it is nearly the whole matrix, by the whole decomposition. The same numbers give the same factors.

    Args:
        matrix: float32. start: the `down` of a matrix that is much like this one, which saves steps.
    """
    least = min(matrix.shape)
    if rank + _SPARE >= least // 2:
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        return (u[:, :rank] * s[:rank]).float(), v[:rank].float()
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(matrix.shape[1], rank + _SPARE, generator=generator).to(matrix.device)
    if start is not None:
        basis[:, : start.shape[0]] = start.T
    for _ in range(_STEPS if start is None else _STEPS // 4):
        basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    rows = torch.linalg.qr(matrix @ basis).Q
    u, s, v = torch.linalg.svd((rows.T @ matrix).double(), full_matrices=False)
    return (rows.double() @ (u[:, :rank] * s[:rank])).float(), v[:rank].float()
