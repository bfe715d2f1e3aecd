"""What tells a model, and what a recipe makes of it, from others in a few bytes: all parts of a calibration agree."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompile.quantization.plan import Plan
from qcompile.quantization.state import ABOUT

_MODEL, _RECIPE, _HASH = f"{ABOUT}model", f"{ABOUT}recipe", 32
_SAMPLED = 256  # numbers of each tensor: of two models one changed nearly all


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of the model's weights, and of all that the recipe wants of its graph."""

    model: bytes
    recipe: bytes

    @classmethod
    def of(cls, program: ExportedProgram, plan: Plan) -> Fingerprint:
        tensors = {**program.state_dict, **program.constants}
        weights = (part for name, value in sorted(tensors.items()) for part in (name, *_parts(value)))
        steps = (step.settings.model_dump_json() for step in plan.steps)
        wanted = (f"{site.name} {_settings(config)}" for site, config in plan.configs.items())
        return cls(_hash(weights), _hash((*wanted, *steps, str(plan.power_of_two))))

    def tensors(self) -> dict[str, torch.Tensor]:
        """As a state has it."""
        both = {_MODEL: self.model, _RECIPE: self.recipe}
        return {name: torch.tensor(list(data), dtype=torch.uint8) for name, data in both.items()}

    @classmethod
    def read(cls, state: Mapping[str, torch.Tensor]) -> Fingerprint | None:
        """That of a state; None where it has none, or a damaged one."""
        found = [state[name] for name in (_MODEL, _RECIPE) if name in state]
        if len(found) < 2 or any(one.dtype is not torch.uint8 or one.shape != (_HASH,) for one in found):
            return None
        return cls(*(bytes(one.tolist()) for one in found))

    def other(self, known: Fingerprint) -> str | None:
        """What differs, in a word."""
        return "model" if self.model != known.model else "recipe" if self.recipe != known.recipe else None


def _settings(config: Any) -> str:
    return str([getattr(config, field.name) for field in fields(config) if field.compare])


def _parts(value: Any) -> Iterable[str | bytes]:
    if not isinstance(value, torch.Tensor):
        return
    flat = value.detach().reshape(-1)
    sampled = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
    yield f"{value.dtype} {list(value.shape)}"
    yield sampled.view(torch.uint8).numpy().tobytes()


def _hash(parts: Iterable[str | bytes]) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()
