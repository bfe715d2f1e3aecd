"""Quantized programs are for inference: no gradient is wrong without a word."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from passes import ir, lift, unlift
from passes.errors import QCompileError
from passes.formats import FP8, INT8
from tests.passes.support import Mlp, export, insert, scale_of

S = torch.tensor(0.05)
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
QKV = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0))

CALLS: dict[str, Callable[[Tensor], Any]] = {
    "quantize": lambda t: ir.QUANTIZE(t, S, format="int8"),
    "scale of quantize": lambda t: ir.QUANTIZE(X, t[0, 0], format="fp8"),
    "dequantize": lambda t: ir.DEQUANTIZE(X.to(torch.int8), t[0, 0], format="int8", dtype=torch.float32),
    "dynamic_quantize": lambda t: ir.DYNAMIC_QUANTIZE(t, None, format="fp8_per_token"),
    "attention": lambda t: ir.ATTENTION(QKV * t[0, 0], QKV, QKV, None, S, is_causal=False, format="fp8"),
    "batched_linear": lambda t: ir.BATCHED_LINEAR(t[None], torch.ones(3, 4, 8)),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_refuses_where_a_gradient_is_wanted(name: str) -> None:
    leaf, call = X.clone().requires_grad_(), CALLS[name]
    refused = pytest.raises(QCompileError, match=f"qcompile::{name.split()[-1]} is for inference.*no gradient")
    with refused:
        call(leaf)
    with refused:
        torch.func.grad(lambda t: t.sum() + torch.as_tensor(call(t)[0]).float().sum())(X)
    with refused, forward_ad.dual_level():
        call(forward_ad.make_dual(X, X))


@pytest.mark.parametrize("name", CALLS)
def test_and_nowhere_else(name: str) -> None:
    leaf, call = X.clone().requires_grad_(), CALLS[name]
    expected = call(X)
    for context in (torch.no_grad, torch.inference_mode, forward_ad.dual_level):
        with context():
            torch.testing.assert_close(call(X if context is forward_ad.dual_level else leaf), expected)
    assert not any(t.requires_grad for t in (expected if isinstance(expected, tuple) else (expected,)))


def quantized(module: nn.Module, fmt: Any = FP8) -> Any:
    program = export(module, X)
    gm = unlift(program)
    insert(gm, lambda site: scale_of(gm.get_parameter(site.name.removesuffix("_quantizer")), fmt).detach()
           if site.operand == "weight" else S, fmt)  # fmt: skip
    return lift(gm, program)


@pytest.mark.parametrize("fmt", [FP8, INT8], ids=["fp8", "int8"])
def test_training_a_quantized_program_is_refused(fmt: Any) -> None:
    module = quantized(Mlp(), fmt).module()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module(X).requires_grad
    with pytest.raises(QCompileError, match="is for inference"):
        module(X.clone().requires_grad_())
    for parameter in module.parameters():
        parameter.requires_grad_()
    with pytest.raises(QCompileError, match="is for inference"):
        module(X)
    with torch.no_grad():
        module(X)


@pytest.mark.slow
def test_compiling_a_quantized_program_with_gradients_is_refused() -> None:
    with pytest.raises(Exception, match="is for inference"):  # a BackendCompilerFailed around it
        torch.compile(quantized(Mlp(), INT8).module(), backend="aot_eager")(X.clone().requires_grad_())


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Mlp(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_gradients_of_a_last_layer_that_is_not_quantized_are_right() -> None:
    program = export(Headed(), X)
    gm = unlift(program)
    insert(gm, lambda site: S if site.name.startswith("body") else None)
    module = lift(gm, program).module()
    weight = module.get_parameter("head.weight").requires_grad_()
    module(X).square().sum().backward()
    assert weight.grad is not None
    step = torch.zeros_like(weight)
    step[1, 2] = 1e-2
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            weight.add_(step, alpha=sign)
            losses.append(module(X).square().sum())
            weight.sub_(step, alpha=sign)
    torch.testing.assert_close(weight.grad[1, 2], (losses[0] - losses[1]) / 2e-2, rtol=1e-3, atol=1e-3)


def test_the_float_model_still_trains() -> None:
    model = Mlp()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    expected = torch.autograd.grad(model(X).sum(), list(model.parameters()))
    program = quantized(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert program.state_dict["up.bias"].data_ptr() == model.up.bias.data_ptr()  # shared, as `lift` says
    model(X).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


def test_a_saved_program_stays_frozen_and_can_be_exported_again() -> None:
    program = quantized(Mlp())
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert not any(tensor.requires_grad for tensor in loaded.state_dict.values())
    again = torch.export.export(loaded.module(), (X.clone().requires_grad_(),))
    torch.testing.assert_close(again.module()(X), program.module()(X), rtol=0, atol=0)
