"""Weights become codes, with exactly the scale that multiplies them later."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn
from torch.testing import FileCheck
from torch.utils._python_dispatch import TorchDispatchMode

from passes.fold.weights import FoldWeights
from passes.formats import FP8, INT8, Format
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.testing import DYNAMIC, count, declines, graph_of, rewrites, run
from tests.passes.support import Mlp, insert, scale_of


@pytest.mark.parametrize("fmt", [FP8, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_codes_take_the_name_of_the_weight(fmt: Format, per_channel: bool) -> None:
    module = Mlp()
    gm = graph_of(module, torch.randn(2, 8), dynamic_shapes=({0: DYNAMIC},))
    scales = {n: scale_of(gm.get_parameter(f"{n}.weight"), fmt, per_channel=per_channel) for n in ("up", "down")}
    insert(gm, lambda site: scales[site.module] if site.operand == "weight" else None, fmt)
    rewrites(FoldWeights, gm, torch.randn(3, 8), fired=2)
    assert (count(gm, QUANTIZE), count(gm, DEQUANTIZE)) == (0, 2)
    FileCheck().check("up.weight").check_not("qcompile.quantization").check("qcompile.dequantize").run(gm.code)
    assert gm.get_parameter("up.weight").dtype is fmt.storage
    names = {"up.weight", "up.bias", "up.weight_scale", "down.weight", "down.bias", "down.weight_scale"}
    assert gm.state_dict().keys() == names
    assert module.up.weight.dtype is torch.float32


weights = hnp.arrays(np.float32, (3, 4), elements=st.floats(width=32))


@given(weight=weights, scale=st.floats(2.0**-20, 2.0**20, width=32))
def test_codes_are_those_of_ml_dtypes(weight: np.ndarray, scale: float) -> None:
    graph = torch.fx.Graph()
    w, s = graph.get_attr("w"), graph.get_attr("s")
    codes = graph.call_function(QUANTIZE, (w, s), {"format": "fp8"})
    graph.output((graph.call_function(DEQUANTIZE, (codes, s), {"format": "fp8", "dtype": torch.float32}),))
    tensors = {"w": nn.Parameter(torch.from_numpy(weight)), "s": torch.tensor(scale)}
    gm = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    for name, tensor in tensors.items():
        setattr(gm, name, tensor) if name == "w" else gm.register_buffer(name, tensor)
    gm.graph = graph
    assert FoldWeights()(gm).modified
    expected = np.clip(weight / np.float32(scale), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(gm.get_parameter("w").float().detach().numpy(), expected.astype(np.float32))


class Largest(TorchDispatchMode):
    """Notes the largest tensor in float32 that is made; a view is none."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = all(returned.alias_info is None for returned in func._schema.returns)
        if is_new and isinstance(result, Tensor) and result.dtype is torch.float32:
            self.size = max(self.size, result.numel())
        return result


def test_a_large_weight_is_quantized_in_pieces() -> None:
    linear, x = nn.Linear(512, 600, bias=False), torch.randn(1, 512)
    gm = graph_of(linear, x)
    scale = scale_of(linear.weight.detach(), FP8, per_channel=True)
    insert(gm, {"weight": scale})
    with Largest() as largest:
        FoldWeights()(gm)
    assert 0 < largest.size <= 1 << 17 < linear.weight.numel()
    expected = (linear.weight.detach() / scale).clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    codes = gm.get_parameter("weight").detach().float().numpy()
    np.testing.assert_array_equal(codes, expected.astype(np.float32))


def test_a_weight_that_something_else_reads_stays_beside_its_codes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            x = self.embed(ids)
            return nn.functional.linear(x, self.embed.weight), x

    ids = torch.arange(3)
    gm = graph_of(Tied(), ids)
    embedded = run(gm, ids)[1]
    insert(gm, {"weight": torch.tensor(0.01)})
    rewrites(FoldWeights, gm, ids)
    assert {name: p.dtype for name, p in gm.named_parameters()} == {
        "embed.weight": torch.float32,
        "embed.weight_1": torch.float8_e4m3fn,
    }
    assert torch.equal(run(gm, ids)[1], embedded)


def test_a_rearranged_weight_is_one_constant() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w.transpose(0, 1))

    x = torch.randn(2, 4)
    gm = graph_of(Transposed(), x)
    insert(gm, {"weight": torch.tensor(0.01)})
    # a product with the transpose laid out anew adds up in another order
    rewrites(FoldWeights, gm, x, rtol=1e-5, atol=1e-5)
    assert {name: tuple(p.shape) for name, p in gm.named_parameters()} == {"w": (6, 4)}


def test_activations_are_left_alone() -> None:
    gm = graph_of(Mlp(), torch.randn(2, 8))
    insert(gm, {"input": torch.tensor(0.02)})
    assert declines(FoldWeights, gm) == []
    assert count(gm, QUANTIZE) == 2


def test_a_weight_with_a_scale_from_run_time_is_left_alone() -> None:
    class Measured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> Tensor:
            scale = x.abs().amax()
            return x @ DEQUANTIZE(QUANTIZE(self.w, scale, format="fp8"), scale, format="fp8", dtype=x.dtype).t()

    assert declines(FoldWeights, graph_of(Measured(), torch.randn(2, 8))) == []
