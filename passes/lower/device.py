"""What the lowerings to torch's own operators have to know of a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        type: as in `torch.device`: "cpu" or "cuda".
        capability: compute capability of a CUDA device, such as (9, 0) for Hopper; None for others.
    """

    type: str
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The kind of `device`."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return cls(device.type, capability)

    def has(self, capability: tuple[int, int]) -> bool:
        """Whether this is a CUDA device with `capability` or a later one."""
        return self.capability is not None and self.capability >= capability
