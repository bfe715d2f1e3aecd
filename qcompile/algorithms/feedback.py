"""Rounding a weight column by column, each with the errors of those before it: GPTQ (Frantar et al. 2022).

With `H = U D U^T`, U unit upper triangular, a layer's squared error is that of `(W - Q) U D^(1/2)`: column k of Q is
best next to `w_k + sum over j < k of (w_j - q_j) U_jk`. These are the paper's updates, whose `Cholesky(H^-1)^T` is the
inverse of `U D^(1/2)`; here nothing is inverted, which is a quarter of the work (the form is QuIP's, Chee et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from passes.formats import Format

__all__ = ["Feedback", "column_order", "feedback_of", "rounded"]

_TRIES = 12  # times ten each: more than any second moment needs


@dataclass(frozen=True)
class Feedback:
    """In which order columns are rounded, and what their errors add to those behind them.

    Attributes:
        order: `[K]`, which column comes first. factors: U in that order, `[K, K]`. weights: D, `[K]`.
    """

    order: torch.Tensor
    factors: torch.Tensor
    weights: torch.Tensor


def column_order(size: torch.Tensor, kind: str, width: int) -> torch.Tensor:
    """Which column is rounded first.

    Args:
        size: `[K]`, the mean of squares of each input. width: of blocks that share a scale, 1 for none.
        kind: `activation`, the largest inputs first; `block`, the same for whole blocks, and within each; or `none`.
    """
    if kind == "none":
        return torch.arange(len(size), device=size.device)
    if kind == "activation" or width == 1:
        return size.argsort(descending=True, stable=True)
    blocks = torch.split(size, width)  # one that is cut stays the last, so that all others begin at multiples
    whole = torch.stack([block.sum() if len(block) == width else block.sum() - torch.inf for block in blocks])
    first = whole.argsort(descending=True, stable=True)
    return torch.cat([blocks[b].argsort(descending=True, stable=True) + b * width for b in first.tolist()])


def feedback_of(moment: torch.Tensor, damping: float, order: torch.Tensor, dtype: torch.dtype) -> Feedback | None:
    """
    Args:
        moment: `H`, `[K, K]`, in float64. A column whose input was always zero is rounded to the nearest.
        damping: what is added to the diagonal, as a part of its mean; ten times as much as long as H is singular.
        order: which column comes first. dtype: of the factors.

    Returns None for a moment that no damping helps.
    """
    unit = moment.diagonal().mean()
    unit = unit if bool(unit > 0) else torch.ones_like(unit)
    size = moment.diagonal() / unit
    backward = order.flip(0)  # torch has H = L L^T only: the L of the reversed H, reversed, is U D^(1/2)
    turned = moment.div(unit).to(dtype)[backward[:, None], backward]
    size = size[backward]
    for tried in range(_TRIES):
        added = damping if not tried else max(damping, 1e-8) * 10**tried
        turned.diagonal().copy_(torch.where(size == 0, 1.0, size + added))
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not int(failed) and bool(lower.diagonal().isfinite().all()):
            roots = lower.diagonal().clone()
            return Feedback(order, lower.div_(roots).flip(0, 1), roots.flip(0).square_())
    return None


def rounded(
    weight: torch.Tensor,
    feedback: Feedback,
    scale_of: Callable[[int, int, torch.Tensor], torch.Tensor],
    fmt: Format,
    block: int,
) -> torch.Tensor:
    """The numbers of `fmt` that stand for a weight `[N, K]`, in units of the scale, in float32.

    Args:
        scale_of: of a column, `[N]`, by its number, by its place in the order, and by what it and the columns behind it
            in the block have become, `[at least those that share its scale, N]`.
        block: how many columns' errors reach those behind them in one product.
    """
    order, factors = feedback.order, feedback.factors
    columns = weight.T.to(factors.dtype)[order].contiguous()
    errors, units = torch.empty_like(columns), torch.empty(columns.shape, dtype=torch.float32, device=columns.device)
    places = order.tolist()
    for start in range(0, len(places), block):
        end = min(start + block, len(places))
        wanted = torch.addmm(columns[start:end], factors[:start, start:end].T, errors[:start])
        for index, at in enumerate(range(start, end)):
            scale = scale_of(places[at], at, wanted[index:]).to(factors.dtype)
            number = fmt.nearest((wanted[index] / scale).float())
            units[at] = number
            error = torch.sub(columns[at], number.to(factors.dtype) * scale, out=errors[at])
            wanted[index + 1 :].addr_(factors[at, at + 1 : end], error)
    found = torch.empty_like(units)
    found[order] = units
    return found.T
