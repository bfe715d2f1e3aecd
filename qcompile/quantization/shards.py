"""States of parts of the data, `qcompile.calibrate(shard=(2, 8))`: what they say of themselves, and how they join.

That stands in the state as tensors, as `torch.save` and safetensors keep these, and what a user saves comes back whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qcompile.algorithms.share import Share
from qcompile.errors import CalibrationError
from qcompile.messages import some
from qcompile.quantization.fingerprint import Fingerprint
from qcompile.quantization.state import ABOUT, is_state

__all__ = ["Shard", "merge_states"]

_SHARD, _MODEL, _RECIPE = f"{ABOUT}shard", f"{ABOUT}model", f"{ABOUT}recipe"
_HASH = 32

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Shard:
    """What the state of a part says of itself.

    Attributes:
        share: which batches it saw. batches: how many that were. fingerprint: of the model and the recipe.
    """

    share: Share
    batches: int
    fingerprint: Fingerprint

    def tensors(self) -> dict[str, torch.Tensor]:
        numbers = torch.tensor([self.share.index, self.share.count, self.batches])
        own = self.fingerprint
        return {_SHARD: numbers, _MODEL: _bytes(own.model), _RECIPE: _bytes(own.recipe)}

    @classmethod
    def read(cls, state: State) -> Shard | None:
        """None for a state of all data. Raises CalibrationError for what nobody wrote so."""
        if _SHARD not in set(state):
            return None
        numbers, hashes = state[_SHARD], [state.get(name) for name in (_MODEL, _RECIPE)]
        whole = numbers.dtype is torch.int64 and numbers.shape == (3,)
        index, count, batches = numbers.tolist() if whole else (0, 0, 0)
        if not 0 <= index < count or batches < 1 or not all(_is_hash(tensor) for tensor in hashes):
            raise CalibrationError("the state of a shard is damaged: calibrate that shard again")
        model, recipe = (bytes(tensor.tolist()) for tensor in hashes if tensor is not None)
        return cls(Share(index, count), batches, Fingerprint(model, recipe))


def merge_states(states: Sequence[State], names: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """What `calibrate` would have returned, had one process seen all data that each of `states` saw its shard of.

    Args:
        states: of all shards, in any order. names: what messages call them.

    Raises:
        CalibrationError: one is missing or there twice, or they are of several models, recipes or sets of data.
    """
    names = names or [f"state {number}" for number in range(1, len(states) + 1)]
    shards = _checked(states, names)
    order = sorted(range(len(states)), key=lambda number: shards[number].share.index)
    found: dict[str, torch.Tensor] = {}
    for number in order:
        for name, value in states[number].items():
            if not name.startswith(ABOUT):
                # carries a NaN on; of the masks that hid all, True is the largest
                found[name] = torch.maximum(found[name], value) if name in found else value
    return found


def _checked(states: Sequence[State], names: Sequence[str]) -> list[Shard]:
    if not states:
        raise CalibrationError("there is nothing to merge: give the states of all shards")
    shards: dict[Share, int] = {}
    found: list[Shard] = []
    for name, state in zip(names, states, strict=True):
        shard = Shard.read(state) if is_state(state) else None
        if shard is None:
            raise CalibrationError(f"{name} is no state of a shard: `calibrate` makes such with shard=(2, 8)")
        first = found[0] if found else shard
        if shard.share.count != first.share.count:
            raise CalibrationError(f"{name} is {shard.share}, and {names[0]} {first.share}: merge those of one run")
        if (what := shard.fingerprint.other(first.fingerprint)) is not None:
            raise CalibrationError(f"{name} was calibrated with another {what} than {names[0]}")
        if shard.share in shards:
            raise CalibrationError(f"{name} and {names[shards[shard.share]]} are both {shard.share}")
        shards[shard.share] = len(found)
        found.append(shard)
    count = found[0].share.count
    missing = [str(number + 1) for number in range(count) if Share(number, count) not in shards]
    if missing:
        raise CalibrationError(f"of {count} shards these are missing: {some(missing)}")
    total = sum(shard.batches for shard in found)
    for name, shard in zip(names, found, strict=True):
        if shard.batches != len(shard.share.numbers(total)):
            raise CalibrationError(
                f"{name} saw {shard.batches} batches, and {shard.share} has {len(shard.share.numbers(total))} of"
                f" {total}: the shards were calibrated with different data"
            )
    return found


def _bytes(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def _is_hash(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.dtype is torch.uint8 and tensor.shape == (_HASH,)
