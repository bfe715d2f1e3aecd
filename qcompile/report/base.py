"""What all reports have: a kind, a version, and JSON that reads back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from passes.base import Decline
from qcompile.errors import ReportError
from qcompile.report.validated import encodable, reason


class ReportBase(BaseModel):
    """What was done, as data: `to_json` and `from_json` give an equal report.

    A subclass says its kind, as `kind: Literal["export"] = "export"`, and stands in the list of `qcompile.reports`. Its
    version goes up where a field is renamed or changes its meaning; a field that is new has a default instead, with
    which older files are read.

    Attributes:
        kind: which report it is. version: of its fields; data that does not say has those of version 1.
        notices: what a reader should know, in sentences.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    version: int = 1
    notices: list[str] = Field(default_factory=list)

    @property
    def passed(self) -> bool:
        """False if it tells of something that failed."""
        return True

    def after(self, notices: Iterable[str]) -> Self:
        """The same report with `notices` of what was done before."""
        return self.model_copy(update={"notices": encodable([*notices, *self.notices])})

    def to_json(self) -> str:
        """The report as JSON text; `qcompile.read_report` and `qcompile inspect` read it back from a file."""
        return self.model_dump_json(indent=2)

    def data(self) -> dict[str, Any]:
        """What `to_json` writes, as plain data."""
        found: dict[str, Any] = json.loads(self.to_json())
        return found

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises ReportError when the text is something else, or of another version."""
        try:
            return cls.from_data(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise ReportError("this is no JSON") from error

    @classmethod
    def from_data(cls, data: object) -> Self:
        """Read what `data` gave. Raises ReportError."""
        try:
            return cls.model_validate(data)
        except (ValidationError, RecursionError) as error:
            told = reason(error) if isinstance(error, ValidationError) else "it is nested too deeply"
            raise ReportError(told) from error

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """Say it in a sentence where the fields are those of another version, before they are looked at."""
        known = cls.model_fields["version"].default
        version = data.get("version", 1) if isinstance(data, Mapping) else known
        if version != known:
            newer = isinstance(version, int) and version > known
            advice = "a newer one wrote it" if newer else "write it again"
            raise ValueError(f"a report of version {version!r:.20}, where this qcompile has version {known}: {advice}")
        return encodable(data)


class ModelReport(ReportBase):
    """What of a model is quantized, and what is not.

    Attributes:
        recipe: name of the one that was asked for; empty without one.
        quantized: module path -> format. A fused weight of all experts counts once.
        unquantized: module path -> what it is, if it stayed in floating point: the kinds of `coverage`, and what
            nothing quantizes (`transposed_convolution`, `recurrent`, `embedding`, `bilinear`, and `low_rank`, a
            product of the low-rank part of a quantized weight).
        reasons: module path -> why it did, but for what the recipe leaves out.
        coverage: kind of layer -> (how many are quantized, how many there are).
        declined: places that were looked at and left, with the reason.
    """

    recipe: str = ""
    quantized: dict[str, str] = Field(default_factory=dict)
    unquantized: dict[str, str] = Field(default_factory=dict)
    reasons: dict[str, str] = Field(default_factory=dict)
    coverage: dict[str, tuple[int, int]] = Field(default_factory=dict)
    declined: list[Decline] = Field(default_factory=list)
