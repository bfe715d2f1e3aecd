"""Every way to write a linear layer, and products that are none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.testing import FileCheck

from passes.constants import add_constant
from passes.graph import aten, module_path, shape
from passes.normalize.linear import NormalizeLinear
from passes.testing import DYNAMIC, blank, count, declines, graph_of, only_call, returns, rewrites, run

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
PRODUCTS = (aten.mm.default, aten.matmul.default, aten.addmm.default)


class Product(nn.Module):
    """`form(x, w, bias)` with parameters w [4, 6] and bias [6], or as shapes say."""

    def __init__(
        self, form: Callable[..., Tensor], weight: tuple[int, ...] = (4, 6), bias: tuple[int, ...] = (6,)
    ) -> None:
        super().__init__()
        self.form = form
        self.w, self.b = nn.Parameter(torch.randn(weight)), nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.w, self.b)


WITH_BIAS = {
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "mm and add": lambda x, w, b: torch.mm(x, w) + b,
    "add first": lambda x, w, b: b + x @ w,
    "matmul": lambda x, w, b: torch.matmul(x, w) + b,
}


@pytest.mark.parametrize("form", WITH_BIAS.values(), ids=WITH_BIAS)
def test_a_product_with_a_bias_is_one_linear_layer(form: Callable[..., Tensor]) -> None:
    gm = graph_of(Product(form), torch.randn(3, 4))
    rewrites(NormalizeLinear, gm, torch.randn(3, 4), **TOLERANCE)
    assert (count(gm, aten.linear.default), count(gm, *PRODUCTS), count(gm, aten.add.Tensor)) == (1, 0, 0)
    FileCheck().check("aten.transpose.int(w, 0, 1)").check("aten.linear.default(x").run(gm.code)
    assert len(only_call(gm, aten.linear.default).args) == 3


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    "form",
    [
        lambda x, w, b: x @ w.t(),
        lambda x, w, b: x @ w.transpose(0, 1),
        lambda x, w, b: x @ w.transpose(-1, -2),
        lambda x, w, b: x @ w.permute(1, 0),
        lambda x, w, b: x @ w.mT,
    ],
    ids=["t", "transpose", "negative", "permute", "mT"],
)
def test_a_transposed_weight_is_a_linear_layer_as_it_is(form: Callable[..., Tensor]) -> None:
    gm = graph_of(Product(form, weight=(6, 4)), torch.randn(3, 4))
    rewrites(NormalizeLinear, gm, torch.randn(3, 4), **TOLERANCE)
    assert only_call(gm, aten.linear.default).args[1].op == "get_attr"  # type: ignore[union-attr]
    assert count(gm, aten.t.default, aten.transpose.int, aten.permute.default) == 0


def test_a_permute_that_moves_nothing_is_not_a_transpose() -> None:
    gm = graph_of(Product(lambda x, w, b: x @ w.permute(0, 1), weight=(4, 4)), torch.randn(3, 4))
    rewrites(NormalizeLinear, gm, torch.randn(3, 4), **TOLERANCE)


def test_the_layer_belongs_to_the_module_of_the_product() -> None:
    gm, emit, (x,) = blank(torch.randn(3, 4))
    weight, bias = (
        add_constant(gm, *named, emit.before) for named in (("w", torch.randn(4, 6)), ("b", torch.randn(6)))
    )
    product = emit(aten.mm.default, x, weight)
    product.meta["nn_module_stack"] = {"layer": ("layer", nn.Linear)}
    returns(gm, emit(aten.add.Tensor, product, bias))
    NormalizeLinear()(gm)
    assert module_path(only_call(gm, aten.linear.default)) == "layer"


def test_leading_axes_and_their_sizes_are_free() -> None:
    gm = graph_of(Product(WITH_BIAS["matmul"]), torch.randn(2, 3, 4), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},))
    rewrites(NormalizeLinear, gm, torch.randn(5, 7, 4), **TOLERANCE)
    assert not isinstance(shape(only_call(gm, aten.linear.default))[0], int)


def test_a_vector_times_a_matrix() -> None:
    gm = graph_of(Product(WITH_BIAS["matmul"]), torch.randn(4))
    rewrites(NormalizeLinear, gm, torch.randn(4), **TOLERANCE)


@pytest.mark.parametrize("bias", [(1,), (3, 6), (3, 1)], ids=str)
def test_what_is_added_and_is_no_bias_stays_an_addition(bias: tuple[int, ...]) -> None:
    for form in (WITH_BIAS["matmul"], WITH_BIAS["addmm"]):
        gm = graph_of(Product(form, bias=bias), torch.randn(3, 4))
        rewrites(NormalizeLinear, gm, torch.randn(3, 4), **TOLERANCE)
        assert (count(gm, aten.linear.default), count(gm, aten.add.Tensor)) == (1, 1)


def test_an_activation_that_addmm_adds_stays_an_addition() -> None:
    gm = graph_of(Product(lambda x, w, b: torch.addmm(x @ w, x.sin(), w)), torch.randn(3, 4))
    rewrites(NormalizeLinear, gm, torch.randn(3, 4), fired=2, **TOLERANCE)
    assert (count(gm, aten.linear.default), count(gm, aten.add.Tensor)) == (2, 1)


def test_a_bias_of_another_dtype_is_added_in_that_dtype() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 6).bfloat16()), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w + self.b

    x = torch.randn(3, 4).bfloat16()
    gm = graph_of(Mixed(), x)
    rewrites(NormalizeLinear, gm, x, rtol=1e-2, atol=1e-2)
    assert run(gm, x)[0].dtype is torch.float32


def test_another_user_of_the_product_keeps_its_values() -> None:
    class Shared(Product):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = x @ self.w
            return y + self.b, y.sin()

    x = torch.randn(3, 4)
    gm = graph_of(Shared(WITH_BIAS["matmul"]), x)
    rewrites(NormalizeLinear, gm, x, **TOLERANCE)
    assert (count(gm, aten.linear.default), count(gm, aten.add.Tensor)) == (1, 1)


@pytest.mark.everyday(4)
@pytest.mark.parametrize(
    ("form", "weight"),
    [
        (lambda x, w, b: x @ x.t(), (4, 6)),
        (lambda x, w, b: x @ w, (2, 4, 6)),
        (lambda x, w, b: x @ (w * 2), (4, 6)),
        (lambda x, w, b: x @ w, (4,)),
        (lambda x, w, b: torch.addmm(b, x, w, alpha=2.0), (4, 6)),
        (lambda x, w, b: torch.addmm(b, x, w, beta=0.5), (4, 6)),
    ],
    ids=["activations", "batched weight", "computed weight", "vector", "alpha", "beta"],
)
def test_what_is_no_linear_layer_stays(form: Callable[..., Tensor], weight: tuple[int, ...]) -> None:
    gm = graph_of(Product(form, weight=weight), torch.randn(3, 4))
    declines(NormalizeLinear, gm)
    assert count(gm, *PRODUCTS, aten.bmm.default) >= 1


@pytest.mark.parametrize(
    ("form", "shape", "transposes"),
    [
        (lambda x, w, b: w @ x.transpose(1, 2), (2, 3, 4), 1),  # Mamba's dt_proj
        (lambda x, w, b: w @ x, (2, 4, 3), 2),
        (lambda x, w, b: w @ x.t(), (3, 4), 2),
        (lambda x, w, b: torch.mm(w, x), (4, 3), 2),
        (lambda x, w, b: w @ x, (2, 5, 4, 3), 2),
    ],
)
def test_a_matrix_times_columns(form: Callable[..., Tensor], shape: tuple[int, ...], transposes: int) -> None:
    x = torch.randn(*shape)
    gm = graph_of(Product(form, weight=(6, 4)), x)
    rewrites(NormalizeLinear, gm, x, **TOLERANCE)
    assert (count(gm, aten.linear.default), count(gm, *PRODUCTS)) == (1, 0)
    assert count(gm, aten.transpose.int) == transposes


def test_a_vector_of_constants_times_columns_stays() -> None:
    gm = graph_of(Product(lambda x, w, b: w @ x, weight=(4,)), torch.randn(4, 3))
    assert declines(NormalizeLinear, gm) == []


@pytest.fixture(scope="module")
def normalized() -> GraphModule:
    gm = graph_of(Product(WITH_BIAS["matmul"]), torch.randn(3, 4), dynamic_shapes=({0: DYNAMIC},))
    NormalizeLinear()(gm)
    return gm


@given(x=hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(4)), elements=st.floats(width=32)))
def test_values_of_every_kind(normalized: GraphModule, x: np.ndarray) -> None:
    tensor = torch.from_numpy(x)
    weight, bias = normalized.get_parameter("w"), normalized.get_parameter("b")
    limit = float(np.nanmax(np.abs(x), initial=1.0))  # rounding errors are those of the largest product
    torch.testing.assert_close(
        run(normalized, tensor)[0], tensor @ weight + bias, equal_nan=True, rtol=1e-4, atol=1e-5 * min(limit, 1e30)
    )
