"""A file against the program that it was made from, step by step, as generation runs both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.export import ExportedProgram

from qcompile.decoders import ProgramRun
from qcompile.errors import VerificationError
from qcompile.generation.decoder_file import DecoderFile
from qcompile.generation.run import Run
from qcompile.generation.session import decoder_session
from qcompile.report.steps import Step, StepsReport

__all__ = ["STEPS", "require_steps", "verify_steps"]

STEPS = 32
_FIRST = 16  # tokens of the longest prefill
# Of the norm of a step's logits. Between equal programs codes flip where two runtimes round another way, and each flip
# reaches everything behind it: layer by layer these are compared exactly, and here what they add up to.
_LIMITS = {(True, True): 0.15, (True, False): 0.02, (False, True): 0.02, (False, False): 1e-3}  # codes, half


def verify_steps(
    path: Path, program: ExportedProgram, tokens: torch.Tensor, *, steps: int = STEPS, context: int | None = None
) -> StepsReport:
    """Prefill and `steps` single tokens, from several lengths of past, in ONNX Runtime beside the program.

    Each keeps its own cache. Tokens are those that the program finds likeliest, given to both. The first row of several
    is padded on the left.

    Args:
        tokens: `[rows, tokens]` to begin with. context: positions of the model: no more tokens are given.
    """
    file = DecoderFile.read(path)
    session = decoder_session(file, ("CPUExecutionProvider",))
    rows = tokens[:2].cpu()
    most = min(rows.shape[1], _FIRST, max(1, (context or _FIRST + steps) - steps))
    found = [step for length in _lengths(most) for step in _beside(session, file, program, rows[:, :length], steps)]
    limit = _limit(file, program)
    return StepsReport(steps=found, limit=limit, depends=_depends(session, file, rows[:, :most]))


def require_steps(report: StepsReport) -> None:
    """Raises VerificationError for steps that are too far from the program's, or that know nothing of those before."""
    if not report.depends:
        raise VerificationError(
            "the second step does not depend on the first: the file forgets its cache from one step to the next"
        )
    if wrong := report.wrong:
        first = wrong[0]
        raise VerificationError(
            f"step by step the file is not the program: {len(wrong)} of {len(report.steps)} steps differ, first that of"
            f" {first.new} tokens behind {first.past}: relative error {first.error:.2g} (at most {report.limit:.2g}),"
            f" {first.other_tokens} other tokens"
        )


def _lengths(most: int) -> list[int]:
    """Of the prefills: one token, some, and all."""
    return sorted({1, max(1, most // 2), most})


def _beside(
    session: Any, file: DecoderFile, program: ExportedProgram, tokens: torch.Tensor, steps: int
) -> Iterator[Step]:
    ours, theirs = ProgramRun(program, len(tokens)), Run(session, file, len(tokens))
    mask = torch.ones_like(tokens)
    if len(tokens) > 1:
        mask[0, : tokens.shape[1] // 2] = 0
    for number in range(1 + steps):
        past = ours.mask.shape[1]
        expected = ours.step(tokens, None if number else mask)[:, -1].float().numpy()
        found = theirs.step(tokens.numpy(), None if number else mask.numpy())[:, -1].astype(np.float32)
        yield Step(past=past, new=tokens.shape[1], error=_error(found, expected), other_tokens=_others(found, expected))
        tokens = torch.from_numpy(expected.argmax(-1))[:, None]


def _error(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    norm = float(np.linalg.norm(expected))
    error = float(np.linalg.norm(found - expected)) / (norm or 1.0)
    return error if np.isfinite(error) else float(np.finfo(np.float32).max)  # JSON has no inf


def _others(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> int:
    """Rows with another likeliest token, and not for a tie: the program has it behind by more than the error."""
    chosen = found.argmax(-1)
    behind = expected.max(-1) - np.take_along_axis(expected, chosen[:, None], -1)[:, 0]
    return int((behind > 2 * np.abs(found - expected).max(-1)).sum())


def _depends(session: Any, file: DecoderFile, tokens: torch.Tensor) -> bool:
    """Whether the logits of a second step, of the same token, change with what the first one was given."""
    changed = (tokens + 1) % file.vocabulary
    next_token = tokens[:, :1].numpy()
    results = []
    for first in (tokens, changed):
        run = Run(session, file, len(tokens))
        run.step(first.numpy())
        results.append(run.step(next_token))
    return not np.array_equal(results[0], results[1])


def _limit(file: DecoderFile, program: ExportedProgram) -> float:
    """How far logits may be from the program's."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    kinds = {value.dtype for value in values if isinstance(value, torch.Tensor)}
    return _LIMITS[file.dequantizes, bool(kinds & {torch.float16, torch.bfloat16})]
