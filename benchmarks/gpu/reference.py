"""What a model should compute: in fp32, in eager bf16, and as a quantized program in plain operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils import _pytree as pytree

from benchmarks.gpu.cases import Inputs, ModelCase
from benchmarks.gpu.chips import Machine
from benchmarks.gpu.models import build

DTYPE = torch.bfloat16


@dataclass
class Reference:
    """What one case should compute: `exact` and `eager` are made once, a recipe's program when it is asked for."""

    case: ModelCase
    machine: Machine
    inputs: Inputs = field(init=False)
    exact: list[torch.Tensor] = field(init=False)
    eager: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = self.case.inputs(self.machine.device, DTYPE)
        model = self.model()
        self.eager = _outputs(model, self.inputs)
        self.exact = _outputs(model.float(), tuple(x.float() for x in self.inputs))

    def model(self) -> nn.Module:
        return build(self.case.make, self.machine.device, DTYPE)

    def program(self, recipe: str) -> list[torch.Tensor]:
        """Outputs of the quantized program in plain operators, on the same device."""
        import qcompile

        program = qcompile.quantize(
            self.model(), self.inputs, recipe=recipe, calibration=[self.inputs], dtype=DTYPE, progress=False
        )
        return _outputs(program.module(), self.inputs)


def _outputs(model: Callable[..., object], inputs: Inputs) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, torch.Tensor)]
