"""Hadamard matrices, the rotation of an axis by them, and the operator that rotates a weight until it is folded.

A rotation spreads an outlier over its block, so that a format with few codes loses less to it. Both operands of a
linear layer are rotated, and the product stays: with `R = H 2^-j` and `R' = H / (n 2^-j)`, `(x R)(w R')^T = x w^T`.
`R`, which a program carries, has entries +-2^-j, exact in every floating-point type; what `1/n` is rounded to (n may be
12 x 2^p) is in `R'`, which is applied to the weight once, in high precision.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from passes.errors import PassError

_LARGEST_FACTOR = 512  # order of a matrix that is stored: 512 KB in half precision
_LEAST_BLOCK = 4
_CHUNK = 1 << 21  # elements of a weight that are rotated at a time: 16 MB in float64

_LIBRARY = torch.library.Library("qcompile", "FRAGMENT")
_LIBRARY.define("hadamard(Tensor w) -> Tensor")


@dataclass(frozen=True)
class Rotation:
    """How an axis is rotated: each block of `left * right` elements, as a `[left, right]` matrix X, is `H_l X H_r`.

    That is a product with the Kronecker product `H_l (x) H_r^T`, a Hadamard matrix again, of which only the two small
    factors are stored; with `left` 1 there is one factor.

    Attributes:
        width: size of the axis.
        left, right: orders of the factors.
    """

    width: int
    left: int
    right: int

    @property
    def block(self) -> int:
        """How many elements are mixed; the axis is `width / block` such blocks."""
        return self.left * self.right

    @property
    def blocked_shape(self) -> list[int]:
        """What the axis is reshaped to, `[width / block, left, right]`, without the axes of size 1."""
        return [*(size for size in (self.width // self.block, self.left) if size > 1), self.right]

    @property
    def weight_factor(self) -> float:
        """What makes the product of both sides the identity: `1 / (n 2^-j)`."""
        return float(2 ** (_exponent(self.left) + _exponent(self.right))) / self.block


@functools.cache
def rotation_for(width: int) -> Rotation | None:
    """The rotation of the largest block that divides `width`; None if there is none of at least 4 elements.

    The whole axis is one block where `width` is a small order times a power of two (or times another small order);
    11008 = 43 x 256 has blocks of 256.
    """
    for blocks in range(1, width // _LEAST_BLOCK + 1):
        if width % blocks == 0 and (factors := _factors(width // blocks)) is not None:
            return Rotation(width, *factors)
    return None


def _factors(order: int) -> tuple[int, int] | None:
    """Orders of two Hadamard matrices whose product is `order`: one if it is small, else the cheapest pair."""
    if order <= _LARGEST_FACTOR and is_order(order):
        return 1, order
    lefts = (left for left in range(2, min(order, _LARGEST_FACTOR) + 1) if order % left == 0)
    pairs = ((left, order // left) for left in lefts if left <= order // left <= _LARGEST_FACTOR)
    return min((pair for pair in pairs if all(map(is_order, pair))), key=sum, default=None)


@functools.cache
def is_order(order: int) -> bool:
    """Whether `hadamard_matrix` can make a matrix of this order.

    These are 1, 2 and all multiples of 4 up to 512 but 28 of them (52, 92, 100 ...), which need prime powers,
    Williamson's construction or a search.
    """
    if order % 4 or order < 4:
        return order in (1, 2)
    return is_order(order // 2) or _paley_prime(order) is not None


@functools.cache
def hadamard_matrix(order: int) -> torch.Tensor:
    """An int8 matrix `H` of +-1 with `H H^T = order I`; shared, so not to be written to.

    Sylvester's doubling where it leads to a known order, and Paley's constructions I and II for primes (R. Paley,
    "On orthogonal matrices", 1933). Raises `PassError` for an order that these do not make.
    """
    if not is_order(order):
        raise PassError(f"there is no construction of a Hadamard matrix of order {order}")
    if order <= 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)[:order, :order]
    if is_order(order // 2):
        return torch.kron(hadamard_matrix(2), hadamard_matrix(order // 2))
    q = _paley_prime(order)
    assert q is not None
    identity, conference = torch.eye(q + 1, dtype=torch.int8), torch.ones(q + 1, q + 1, dtype=torch.int8)
    conference[0, 0], conference[1:, 1:] = 0, _residue_matrix(q)
    if q % 4 == 3:
        conference[1:, 0] = -1
        return identity + conference
    sign = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, hadamard_matrix(2)) + torch.kron(identity, sign)


def _paley_prime(order: int) -> int | None:
    """The prime that Paley's construction I (q + 1 = order, a multiple of 4) or II (2 (q + 1) = order) starts from."""
    if _is_prime(order - 1):  # 3 modulo 4, as order is a multiple of 4
        return order - 1
    q = order // 2 - 1
    return q if q % 4 == 1 and _is_prime(q) else None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _residue_matrix(q: int) -> torch.Tensor:
    """`[q, q]`: 1 where column - row is a square modulo q, -1 where it is none, 0 on the diagonal."""
    character = torch.full((q,), -1, dtype=torch.int8)
    numbers = torch.arange(q)
    character[numbers * numbers % q] = 1
    character[0] = 0
    return character[(numbers[None] - numbers[:, None]) % q]


def _exponent(order: int) -> int:
    """j such that `2^-j` is `1 / sqrt(order)`, or the next power of two below: a rotated value never grows by it."""
    return ((order - 1).bit_length() + 1) // 2


def activation_factor(order: int, dtype: torch.dtype) -> torch.Tensor:
    """The factor that an activation is multiplied by: entries +-2^-j, which every `dtype` holds exactly."""
    return hadamard_matrix(order).to(dtype) * 2.0 ** -_exponent(order)


def hadamard(w: torch.Tensor) -> torch.Tensor:
    """`[..., K]` -> float32 `[..., K]`: a weight rotated along its last axis, for an activation that is rotated too.

    Rows are independent: a slice of `w` gives the slice of the result. The sums are made in float64, so that the order
    in which a BLAS adds, which depends on the number of rows, does not show.

    Raises:
        PassError: there is no rotation for K.
    """
    rotation = rotation_for(w.shape[-1])
    if rotation is None:
        raise PassError(f"no Hadamard matrix fits an axis of {w.shape[-1]} elements")
    left, right = (hadamard_matrix(n).to(w.device, torch.float64) for n in (rotation.left, rotation.right))
    rows = w.detach().reshape(-1, rotation.width)
    result = torch.empty_like(rows, dtype=torch.float32, memory_format=torch.contiguous_format)
    step = max(1, _CHUNK // rotation.width)
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step]
        rotated = chunk.double().reshape(-1, rotation.right) @ right
        if rotation.left > 1:
            rotated = left @ rotated.reshape(-1, rotation.left, rotation.right)
        torch.mul(rotated.reshape(chunk.shape), rotation.weight_factor, out=result[start : start + step])
    return result.reshape(w.shape)


_LIBRARY.impl("hadamard", hadamard, "CompositeExplicitAutograd")


@torch.library.register_fake("qcompile::hadamard", lib=_LIBRARY)
def _hadamard_fake(w: torch.Tensor) -> torch.Tensor:
    return w.new_empty(w.shape, dtype=torch.float32)


HADAMARD = torch.ops.qcompile.hadamard.default
"""Exists from `RotateLinears` to `FoldWeights` (`FoldConstants` for a weight in floats), which evaluates it."""
