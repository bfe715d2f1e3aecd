"""Whether the constants of a graph are written to, which they must not be: they share memory with the user's model.

A graph as text does not show that, nor does the version of a tensor, which a write by way of `.data` leaves alone. So
sums of the bytes are kept: 0.17 s for 300 MB on two slow cores, in front of each pass of a user and behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from passes.compat import FakeTensor

__all__ = ["Contents"]

_WORDS = 1024
_BLOCK = _WORDS * 8  # bytes


@dataclass(frozen=True)
class Contents:
    """What is in the memory of the constants of a graph.

    Attributes:
        held: name of a constant -> its memory, and sums of what was in it.
    """

    held: dict[str, tuple[Any, list[torch.Tensor]]]

    @classmethod
    def of(cls, gm: GraphModule) -> Contents:
        """Those of `gm` and of the graphs in its calls. A tensor of a class of its own is left out: its memory is not
        in one place."""
        held: dict[int, tuple[str, Any]] = {}
        for name, tensor in (*gm.named_parameters(), *gm.named_buffers()):
            is_plain = not isinstance(tensor, FakeTensor) and tensor.layout is torch.strided and not tensor.is_meta
            if is_plain and type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
                storage = tensor.untyped_storage()
                held.setdefault(storage.data_ptr(), (name, storage))
        return cls({name: (storage, _sums(storage)) for name, storage in held.values()})

    def written(self) -> list[str]:
        """Names of the constants in whose memory is something else now."""
        return [name for name, (storage, sums) in self.held.items() if not _equal(sums, _sums(storage))]


def _sums(storage: Any) -> list[torch.Tensor]:
    """Sums of all rows and columns of the bytes as 64-bit numbers, which a permutation of them changes, too."""
    data = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    whole = data.numel() // _BLOCK * _BLOCK
    words = data[:whole].view(torch.int64).view(-1, _WORDS)
    return [words.sum(0), words.sum(1), data[whole:].clone()]


def _equal(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, before, after))
