"""Hadamard matrices, judged by their definition in exact integers and by SciPy's; both sides cancel in a product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.errors import PassError
from passes.hadamard import HADAMARD, activation_factor, hadamard, hadamard_matrix, is_order, rotation_for

ORDERS = [order for order in range(1, 513) if is_order(order)]
# prime powers (343 + 1), Williamson's construction or a search would give most of these
MISSING = [
    *(52, 92, 100, 116, 156, 172, 184, 188, 232, 236, 244, 260, 268, 292, 324),
    *(340, 344, 356, 372, 376, 404, 412, 428, 436, 452, 472, 476, 508),
]  # fmt: skip


def test_the_orders_that_are_known() -> None:
    assert sorted([*ORDERS, *MISSING]) == [1, 2, *range(4, 513, 4)]
    assert {12, 20, 24, 28, 36, 44, 60, 76, 108, 140, 148} < set(ORDERS)
    products = {a * b for a in ORDERS for b in ORDERS if a * b <= 512}
    assert products <= set(ORDERS)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix.shape == (order, order)
    assert matrix.dtype is torch.int8
    assert bool((matrix.abs() == 1).all())
    wide = matrix.double()  # integers below 2^53
    assert torch.equal(wide @ wide.T, order * torch.eye(order, dtype=torch.float64))


def test_powers_of_two_are_those_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    for power in range(10):
        assert torch.equal(hadamard_matrix(2**power).long(), torch.from_numpy(linalg.hadamard(2**power)).long())


@pytest.mark.parametrize("order", [0, 3, 6, 52, 668])
def test_an_order_without_a_construction_is_an_error(order: int) -> None:
    with pytest.raises(PassError, match=f"order {order}$"):
        hadamard_matrix(order)


@pytest.mark.parametrize(
    ("width", "blocks", "left", "right"),
    [
        (64, 1, 1, 64),
        (384, 1, 1, 384),
        (512, 1, 1, 512),
        (768, 1, 24, 32),  # ViT-base
        (2736, 1, 36, 76),  # two orders that are no power of two
        (4096, 1, 64, 64),
        (14336, 1, 112, 128),  # Llama 3 8B: 28 x 512
        (18944, 1, 128, 148),  # Qwen2.5 7B: 148 x 128
        (11008, 43, 1, 256),  # Llama 2 7B
        (4304, 269, 1, 16),  # SigLIP so400m
        (52, 13, 1, 4),
        (262144, 1, 512, 512),
        (524288, 2, 512, 512),  # more would need a third factor
    ],
)
def test_the_largest_block_in_small_factors(width: int, blocks: int, left: int, right: int) -> None:
    rotation = rotation_for(width)
    assert rotation is not None
    assert (width // rotation.block, rotation.left, rotation.right) == (blocks, left, right)
    assert all(isinstance(size, int) for size in (rotation.left, rotation.right, *rotation.blocked_shape))


@pytest.mark.parametrize("width", [0, 1, 2, 7, 10, 250, 1021])
def test_a_width_without_a_rotation(width: int) -> None:
    assert rotation_for(width) is None
    with pytest.raises(PassError, match=f"axis of {width} elements"):
        hadamard(torch.ones(3, 2, width))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_are_exact_in_half_precision(dtype: torch.dtype) -> None:
    for order in ORDERS:
        factor = activation_factor(order, dtype)
        assert factor.dtype is dtype
        assert torch.equal(factor.double(), activation_factor(order, torch.float64))
        magnitude = float(factor[0, 0].abs())
        assert magnitude.hex().startswith("0x1.0000000000000p")
        assert 0.5 < magnitude * order**0.5 <= 1  # orthogonal to within a factor of 2, and never larger


def rotate(x: torch.Tensor) -> torch.Tensor:
    """The side of the activation, as one matrix in float64."""
    rotation = rotation_for(x.shape[-1])
    assert rotation is not None
    left, right = (activation_factor(n, torch.float64) for n in (rotation.left, rotation.right))
    block = torch.kron(left.T.contiguous(), right)  # of the row vector x
    return (x.double().unflatten(-1, (-1, rotation.block)) @ block).flatten(-2)


widths = st.one_of(
    st.integers(1, 64).map(lambda n: 4 * n),
    st.sampled_from([12, 20, 28, 36, 60, 108, 140, 148]).flatmap(
        lambda m: st.integers(0, 4).map(lambda power: m << power)
    ),
)


@given(width=widths, lead=st.lists(st.integers(1, 3), max_size=2), seed=st.integers(0, 99))
def test_both_sides_cancel_in_a_product(width: int, lead: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(4, width, generator=generator), torch.randn(*lead, 3, width, generator=generator)
    expected = x.double() @ w.double().mT
    torch.testing.assert_close(rotate(x) @ hadamard(w).double().mT, expected, rtol=1e-6, atol=1e-6 * width**0.5)


@pytest.mark.parametrize("width", [1024, 2048 * 3])
def test_two_factors_are_their_kronecker_product(width: int) -> None:
    rotation = rotation_for(width)
    assert rotation is not None and rotation.left > 1
    both = torch.kron(*(hadamard_matrix(n).double() for n in (rotation.left, rotation.right)))
    w = torch.randn(3, width)
    rows = w.double().reshape(3, -1, rotation.block) @ both
    torch.testing.assert_close(hadamard(w), (rows.reshape(3, width) * rotation.weight_factor).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [768, 1408, 304])
def test_a_slice_of_a_weight_gives_a_slice_of_the_result(dtype: torch.dtype, width: int) -> None:
    w = torch.nn.Parameter(torch.randn(301, width).to(dtype))
    whole = torch.ops.qcompile.hadamard(w)
    assert (whole.dtype, whole.shape) == (torch.float32, w.shape)
    for rows in (1, 3, 64):
        assert torch.equal(torch.cat([hadamard(part) for part in w.split(rows)]), whole)
    assert torch.equal(hadamard(w.T.contiguous().T), whole)
    assert torch.equal(hadamard(w[:300].reshape(3, 100, width)), whole[:300].reshape(3, 100, width))
    assert hadamard(w[:0]).shape == (0, width)


def test_the_operator_keeps_its_contract() -> None:
    for w in (torch.randn(3, 12), torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(12)):
        torch.library.opcheck(HADAMARD, (w,), test_utils=("test_schema", "test_faketensor"))
