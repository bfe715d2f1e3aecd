"""A learned temperature of attention scores goes to the query."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes.constants import add_constant
from passes.graph import Emitter, aten, calls
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.normalize.attention import NormalizeAttention
from passes.normalize.temperature import TemperatureToQuery
from passes.sdpa import SDPA
from passes.testing import DYNAMIC, declines, graph_of, only_call, rewrites

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
Form = Callable[[Tensor, Tensor, nn.Module], Tensor]


class Attention(nn.Module):
    """`form` makes scores of x [B,H,S,D], transposed keys and the module's parameters."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.heads, self.rows = nn.Parameter(torch.rand(2, 1, 1) + 0.5), nn.Parameter(torch.rand(5, 1) + 0.5)
        self.one, self.keys = nn.Parameter(torch.rand(()) + 0.5), nn.Parameter(torch.rand(5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x.transpose(-1, -2), self).softmax(-1) @ x


FORMS: dict[str, Form] = {
    "heads": lambda q, k, m: q @ k * m.heads,
    "from the left": lambda q, k, m: m.heads * (q @ k),
    "divided": lambda q, k, m: q @ k / m.heads,
    "rows": lambda q, k, m: q @ k * m.rows,
    "one number": lambda q, k, m: q @ k * m.one.exp(),
    "scale first": lambda q, k, m: q @ k * 0.5 * m.heads.clamp(max=1.0).exp(),
    "bias behind": lambda q, k, m: q @ k * m.heads + m.keys,
    "of the batch": lambda q, k, m: q @ k * q.mean((1, 2, 3), keepdim=True).exp(),
}


@pytest.mark.everyday(4)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_the_query_is_multiplied(form: Form) -> None:
    x = torch.randn(3, 2, 5, 4)
    dynamic = ({0: DYNAMIC},) if form is FORMS["of the batch"] else None
    gm = graph_of(Attention(form), x, dynamic_shapes=dynamic)
    rewrites(TemperatureToQuery, gm, x, **CLOSE)
    rewrites(NormalizeAttention, gm, x, **CLOSE)
    query = only_call(gm, SDPA).args[0]
    assert query.target in (aten.mul.Tensor, aten.div.Tensor)  # type: ignore[union-attr]


STAYS: dict[str, Form] = {
    "keys": lambda q, k, m: q @ k * m.keys,
    "scores": lambda q, k, m: q @ k * (q @ k),
    "no softmax": lambda q, k, m: (q @ k * m.heads).relu(),
    "a number": lambda q, k, m: q @ k * 0.5,
    "of what": lambda q, k, m: m.heads / (q @ k),
    "behind a mask": lambda q, k, m: (q @ k + m.keys) * m.heads,
}


@pytest.mark.everyday(3)
@pytest.mark.parametrize("form", STAYS.values(), ids=STAYS.keys())
def test_what_is_no_temperature_stays(form: Form) -> None:
    gm = graph_of(Attention(form), torch.randn(3, 2, 5, 4))
    assert declines(TemperatureToQuery, gm) == []


def test_what_another_tool_quantized_before_the_product_stays_there() -> None:
    gm = graph_of(Attention(FORMS["heads"]), torch.randn(3, 2, 5, 4))
    product = next(iter(calls(gm.graph, aten.matmul.default)))
    emit, scale = Emitter(product), add_constant(gm, "scale", torch.tensor(0.02), product)
    codes = emit(QUANTIZE, product.args[0], scale, format="fp8")
    product.update_arg(0, emit(DEQUANTIZE, codes, scale, format="fp8", dtype=torch.float32))
    gm.recompile()
    assert declines(TemperatureToQuery, gm) == []
