"""Random networks: `network(seed)` is always the same one, with inputs, and knows how it was made."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.steps import Step, made

DYNAMIC = torch.export.Dim.DYNAMIC


class Network(nn.Module):
    """Random steps, one after the other, some of which are read again at the end.

    Args:
        width: of the input.
        steps: what is done to it.
        returns: "tensor", "tuple", "dict" or "none" (a dict with a None in it).
        again: index of a step whose result the last one is joined with; None for none.
    """

    def __init__(self, width: int, steps: list[Step], returns: str, again: int | None) -> None:
        super().__init__()
        self.steps, self.width, self.returns, self.again = nn.ModuleList(steps), width, returns, again
        for index, step in enumerate(steps):
            step.path = f"steps.{index}"

    @property
    def exact(self) -> bool:
        """Whether the oracle knows every step."""
        return all(step.exact for step in self.steps)  # type: ignore[union-attr]

    def forward(self, x: Tensor, other: Tensor, mask: Tensor) -> Any:
        context, middle = {"other": other, "mask": mask}, x
        for index, step in enumerate(self.steps):
            x = step(x, context)
            if index == self.again:
                middle = x
        if self.returns == "tensor":
            return x if self.again is None else x.mean(1) + middle.mean((1, 2), keepdim=True).squeeze(2)
        if self.returns == "tuple":
            return x, middle
        return {"hidden": x, "pooled": x.mean(1), "aux": None if self.returns == "none" else middle}


@dataclass(frozen=True)
class Case:
    """One network with example inputs.

    Attributes:
        seed: `network(seed)` makes it again.
        inputs: x `[B, S, D]`, another sequence `[B, T, D']` for cross attention, a boolean mask `[B, 1, S, S]`.
        dynamic_shapes: as in `torch.export.export`, or None.
        model: in eval mode.
    """

    seed: int
    model: Network
    inputs: tuple[Tensor, ...]
    dynamic_shapes: Any

    def __str__(self) -> str:
        names = [type(step).__name__ for step in self.model.steps]
        sizes = [list(tensor.shape) for tensor in self.inputs]
        return f"seed {self.seed}: {' > '.join(names)}, returns {self.model.returns}, inputs {sizes}" + (
            ", dynamic" if self.dynamic_shapes else ""
        )


def network(seed: int, *, dynamic: bool | None = None) -> Case:
    """The network of `seed`, on inputs that make every output finite.

    Args:
        dynamic: whether batch and length are dynamic; None draws it.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    width = draw.choice((16, 32, 32, 48, 20))
    batch, length = draw.choice((1, 2, 3)), draw.choice((1, 3, 8, 17, 32, 40))
    is_dynamic = draw.random() < 0.3 if dynamic is None else dynamic
    if is_dynamic:
        batch, length = max(batch, 2), max(length, 8)
    steps: list[Step] = []
    at = width
    for _ in range(draw.randint(1, 6)):
        steps.append(made(draw, at, width))
        at = steps[-1].out
    if not any(parameter.ndim == 2 for step in steps for parameter in step.parameters()):
        steps.append(made_linear(draw, at))
    returns = draw.choice(("tensor", "tensor", "tuple", "dict", "none"))
    again = draw.randrange(len(steps)) if draw.random() < 0.4 else None
    model = Network(width, steps, returns, again).eval()
    mask = torch.rand(batch, 1, length, length) < 0.7
    mask |= torch.eye(length, dtype=torch.bool)  # every query sees a key: without one, forms differ by design
    inputs = (torch.randn(batch, length, width), torch.randn(batch, draw.choice((4, 9)), width), mask)
    shapes = ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC}, {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}) if is_dynamic else None
    return Case(seed, model, inputs, shapes)


def made_linear(draw: random.Random, width: int) -> Step:
    """A linear layer: a network without a weight tests nothing."""
    while True:
        step = made(draw, width)
        if type(step).__name__ in ("Linear", "Module"):
            return step
