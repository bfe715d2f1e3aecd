"""What the lowerings to torch's own operators have to know of a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from passes.capabilities import HOPPER


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

    def __str__(self) -> str:
        """The device in messages."""
        if self.capability is None:
            return f"a {self.type} device"
        return f"compute capability {self.capability[0]}.{self.capability[1]}"

    @property
    def is_hopper(self) -> bool:
        """Whether this has what cuBLAS offers on Hopper alone: products in blocks of 128, grouped ones."""
        return self.has(HOPPER[0]) and not self.has(HOPPER[1])

    def has(self, capability: tuple[int, int]) -> bool:
        """Whether this is a CUDA device with `capability` or a later one."""
        return self.capability is not None and self.capability >= capability
