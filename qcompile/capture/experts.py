"""Mixtures of experts of Hugging Face models, captured so that each GEMM is a product with a constant weight.

Transformers gathers the weights of the experts that a token was sent to, or sorts the tokens by expert; neither is a
GEMM of constant weights, and no back end runs it in low precision. Here every expert sees every token, and what it was
not asked for is multiplied by zero: exact and of static shape, for `experts / top_k` times the arithmetic. This is for
modules; in a program that was exported before, `passes.normalize.routed_experts` makes the same of what it recognises.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from passes import ir
from qcompile.compat.transformers import experts_of, has_experts_interface, set_experts

NAME = "qcompile_dense"


@contextlib.contextmanager
def dense_experts(model: torch.nn.Module) -> Iterator[None]:
    """Within the body, the mixtures of experts in `model` run as `dense_experts_forward`.

    Their configurations are put back on the way out. A model that has none, or whose transformers release has no
    `ExpertsInterface`, is left alone.
    """
    experts: list[Any] = [module for module in model.modules() if _has_interface(module)]
    configs: dict[int, Any] = {id(module.config): module.config for module in experts}
    found = [(config, experts_of(config)) for config in configs.values()]
    if found:
        _register()
    try:
        for config, _ in found:
            set_experts(config, NAME)
        yield
    finally:
        for config, implementation in found:
            set_experts(config, implementation)


def make_dense(model: torch.nn.Module) -> None:
    """Let the mixtures of experts in `model` run as `dense_experts_forward` from now on, if it has any."""
    for module in model.modules():
        if _has_interface(module):
            _register()
            set_experts(module.config, NAME)


def _register() -> None:
    # the module that a model's experts come from is imported already
    sys.modules["transformers.integrations.moe"].ExpertsInterface.register(NAME, dense_experts_forward)


def _has_interface(module: Any) -> bool:
    """Whether `module` is a class that transformers' `use_experts_implementation` decorated."""
    return "transformers.integrations.moe" in sys.modules and has_experts_interface(module)


def dense_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token, summed with the routing weights: an experts implementation for transformers.

    Args:
        self: a module that `use_experts_implementation` decorated.
        hidden_states: `[T, H]`.
        top_k_index: `[T, k]`; an index outside of the experts (other ranks' under expert parallelism) counts for none.
        top_k_weights: `[T, k]`.

    Returns:
        `[T, H]`.
    """
    name = "gate_up_proj" if self.has_gate else "up_proj"
    hidden = _linear(self, name, hidden_states.unsqueeze(0))  # [E, T, 2I] or [E, T, I]
    hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
    result = _linear(self, "down_proj", hidden)  # [E, T, H]
    if self.has_post_expert_norm:
        result = self.post_expert_norm(result)
    # not a scatter: this one takes indices outside of the range, and one index twice, and is pointwise
    expert = torch.arange(self.num_experts, device=top_k_index.device).view(-1, 1, 1)
    weight = (top_k_weights * (top_k_index == expert)).sum(-1, keepdim=True)  # [E, T, 1]
    # not the product alone: an expert can overflow half precision on a token that is not its own, and inf * 0 is NaN
    return torch.where(weight == 0, 0.0, result * weight).sum(0).to(hidden_states.dtype)


def _linear(experts: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)
    if isinstance(weight, torch.nn.Module):  # a quantized layer in place of the parameter, `load_checkpoint` has put it
        quantized: torch.Tensor = weight(x)
        return quantized
    if experts.is_transposed:
        weight = weight.transpose(-1, -2)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    result: torch.Tensor = ir.BATCHED_LINEAR(x.to(weight.dtype), weight, bias)
    return result
