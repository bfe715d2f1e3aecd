"""What tests of the torch.compile back end share: recipes, compiling, and the judge."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qcompile

LINEARS = ({"quantizer": "*.weight_quantizer", "format": "fp8", "granularity": "per_channel"},)
WEIGHT_ONLY = {"metadata": {"name": "weight_only", "description": "FP8 weights."}, "rules": list(LINEARS)}
DYNAMIC = "fp8_per_channel_per_token"


class Mlp(nn.Module):
    """Two linear layers, one of them 32 x 16: small codes that are easy to find in memory."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, 32)
        self.down = nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def compiled(
    model: Any, recipe: Any = WEIGHT_ONLY, *, dynamic: bool | None = None, fullgraph: bool = True, **options: Any
) -> Callable[..., Any]:
    """`model` through the back end; the passes alone unless a target is given."""
    given = {"recipe": recipe, "target": "eager", **options}
    result: Callable[..., Any] = torch.compile(
        model, backend="qcompile", dynamic=dynamic, fullgraph=fullgraph, options=given
    )
    return result


def reference(model: nn.Module, *args: Any, recipe: Any = WEIGHT_ONLY, **kwargs: Any) -> Any:
    """What the quantized program of the model's weights as they are now computes, in the model's own dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    program = qcompile.quantize(model, args, kwargs, recipe=recipe, dtype=dtype, progress=False)
    with torch.no_grad():
        return program.module()(*args, **kwargs)


def rounded_copy(model: nn.Module) -> Any:
    """`model` with the weight of each linear layer rounded to FP8 by row: what `WEIGHT_ONLY` asks for, by other code
    than qcompile's (test_contexts.py compares the two)."""
    result = copy.deepcopy(model)
    for module in result.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = rounded(module.weight)
    return result


def rounded(weight: Tensor) -> Tensor:
    """`weight` in FP8 with a scale for each row."""
    wide = weight.detach().float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-6) / 448
    return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).to(weight.dtype)


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """All tensors of `actual` are `expected`, to `tolerance` of the largest magnitude."""
    left, right = pytree.tree_leaves(_plain(actual)), pytree.tree_leaves(_plain(expected))
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        if not isinstance(b, Tensor):
            assert a == b
            continue
        assert a.dtype == b.dtype and a.shape == b.shape
        largest = float(b.detach().abs().max()) if b.numel() and b.dtype != torch.bool else 1.0
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=tolerance * max(largest, 1e-30))


def assert_current(run: Callable[..., Any], model: nn.Module, *args: Any) -> None:
    """`run(*args)` has the numbers of the weights that `model` has now, and they are not those of the float model."""
    with torch.no_grad():
        plain, expected = model(*args), rounded_copy(model)(*args)
    assert_same(run(*args), expected)
    assert not torch.allclose(plain, expected, rtol=0, atol=1e-5 * float(plain.abs().max())), "nothing was quantized"


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
