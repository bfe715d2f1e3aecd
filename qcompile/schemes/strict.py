"""What people write in recipes, as pydantic reads it: nothing is guessed, and nothing that is not known is taken."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Fields of the types that they say, and no others; what stands below a field describes it in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
