"""A decoder's file against its program, step by step, as reports have it; `qcompile.generation.verify` makes it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qcompile.report.base import ReportBase


class Step(BaseModel):
    """One call of the model.

    Attributes:
        past, new: tokens that were given before, and in this step.
        error: of the logits of the last position, relative to their norm.
        other_tokens: rows with another likeliest token, beyond what the error explains.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    past: int
    new: int
    error: float
    other_tokens: int = 0


class StepsReport(ReportBase):
    """Prefills of several lengths and the single tokens behind each.

    Attributes:
        steps: all of them. limit: the largest error that is none. depends: the second step knows of the first.
    """

    kind: Literal["steps"] = "steps"
    steps: list[Step] = Field(default_factory=list)
    limit: float
    depends: bool

    @property
    def wrong(self) -> list[Step]:
        """Steps that are too far from the program's."""
        return [step for step in self.steps if step.other_tokens or step.error > self.limit]

    @property
    def passed(self) -> bool:
        """The file generates what the program does."""
        return self.depends and not self.wrong
