"""What an engine that generates has to take; without onnx, as the command line reads it before anything else."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.errors import EngineError


@dataclass(frozen=True)
class GenerationProfiles:
    """What an engine that generates takes.

    Attributes:
        context: tokens of the longest sequence, its prompt and what is generated; None: as many as the model has
            positions, as genai_config.json beside the file says, or a static cache's length.
        prompt: tokens that are taken at once at most; None: the whole context. A longer prompt is taken in parts.
        batch: sequences at once, at most.
    """

    context: int | None = None
    prompt: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("context", "prompt", "batch"):
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise EngineError(f"profiles: {name} is a count of at least 1, not {count!r}")
        if self.context is not None and self.prompt is not None and self.prompt > self.context:
            raise EngineError(f"profiles: a prompt of {self.prompt} tokens does not fit a context of {self.context}")
