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
from qcompile.quantization.kept import merged_statistics
from qcompile.quantization.state import ABOUT, is_state

__all__ = ["Shard", "merge_states"]

_SHARD = f"{ABOUT}shard"

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
        return {_SHARD: torch.tensor([self.share.index, self.share.count, self.batches]), **self.fingerprint.tensors()}

    @classmethod
    def read(cls, state: State) -> Shard | None:
        """None for a state of all data. Raises CalibrationError for what nobody wrote so."""
        if _SHARD not in set(state):
            return None
        numbers = state[_SHARD]
        whole = numbers.dtype is torch.int64 and numbers.shape == (3,)
        index, count, batches = numbers.tolist() if whole else (0, 0, 0)
        fingerprint = Fingerprint.read(state)
        if not 0 <= index < count or batches < 1 or fingerprint is None:
            raise CalibrationError("the state of a shard is damaged: calibrate that shard again")
        return cls(Share(index, count), batches, fingerprint)


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
    found = merged_statistics([states[number] for number in order])
    if found:
        found |= shards[0].fingerprint.tensors()
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
