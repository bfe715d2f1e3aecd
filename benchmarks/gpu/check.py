"""Whether a candidate computes what it should, decided before it is timed.

The weights are random, so no accuracy can judge a quantizer, and no fixed number can: how much noise a format makes
depends on the model. What is asked instead is in relation to a reference that no kernel and no compiler had a part in:

- bf16 candidates: no more noise than twice that of eager bf16, both against the same model in fp32 (3 dB);
- qcompile: nearer to the quantized program in plain torch operators than that program is to the unquantized model, and
  as near to the unquantized model as the program is, to within 1 dB;
- torchao, whose numbers are its own: no more noise than every linear layer of the model would add up to, if each added
  that of its two quantized operands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

EQUAL = 300.0  # dB; JSON knows no infinity


def snr(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Signal-to-noise ratio in dB, the worst of the outputs.

    Equal outputs have `EQUAL`; -inf is for what is not finite or has another shape.
    """
    return min(_snr(a, b) for a, b in zip(found, reference, strict=True))


def _snr(found: torch.Tensor, reference: torch.Tensor) -> float:
    if found.shape != reference.shape or not bool(torch.isfinite(found).all()):
        return -math.inf
    reference = reference.double() if reference.device.type == "cpu" else reference.float()
    noise = torch.linalg.vector_norm(found.to(reference.dtype) - reference).item()
    signal = torch.linalg.vector_norm(reference).item()
    if noise == 0:
        return EQUAL
    return min(20 * math.log10(signal / noise), EQUAL) if signal else -math.inf


def cosine(found: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Cosine of the angle between the outputs, the worst of them."""
    return min(
        torch.cosine_similarity(a.float().flatten(), b.float().flatten(), 0).item()
        for a, b in zip(found, reference, strict=True)
    )


def add_noise(*ratios: float, times: int = 1) -> float:
    """SNR of a sum of independent noises, `times` times over."""
    return -10 * math.log10(times * sum(10 ** (-ratio / 10) for ratio in ratios))


@dataclass
class Verdict:
    """`numbers` are in dB (or a cosine) by name; `faults` say which bar was missed, empty for a right answer."""

    numbers: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def at_least(self, name: str, value: float, bar: float, why: str) -> None:
        """Note `value`; it has to reach `bar`."""
        self.numbers[name] = value
        if not value >= bar:  # NaN reaches nothing
            self.faults.append(f"{name} is {value:.1f} dB, and {why} is {bar:.1f} dB")


Outputs = Sequence[torch.Tensor]


def against_exact(found: Outputs, exact: Outputs, eager: Outputs) -> Verdict:
    """Of a candidate in the model's own dtype. `exact` is fp32, `eager` the same model in that dtype."""
    verdict = Verdict({"cosine": cosine(found, exact)})
    verdict.at_least("to fp32", snr(found, exact), snr(eager, exact) - 3, "eager bf16, less 3 dB,")
    return verdict


def against_program(found: Outputs, program: Outputs, exact: Outputs, margin: float = 0.0) -> Verdict:
    """Of a quantized candidate that has to compute what `program` did.

    `margin` (dB) is asked on top where every quantizer has the same input on both sides, so that no code differs.
    """
    verdict = Verdict({"cosine": cosine(found, exact)})
    noise = snr(program, exact)
    verdict.at_least("to program", snr(found, program), noise + margin, "the noise of the format in it")
    verdict.at_least("to fp32", snr(found, exact), noise - 1, "the program itself, less 1 dB,")
    return verdict


def against_bound(found: Outputs, exact: Outputs, operands: Sequence[float], linears: int) -> Verdict:
    """Of a quantized candidate without a program. `operands`: SNR of the operands of one linear layer."""
    verdict = Verdict({"cosine": cosine(found, exact)})
    bound = add_noise(*operands, times=linears)
    verdict.at_least("to fp32", snr(found, exact), bound, f"the sum of {linears} quantized layers")
    return verdict
