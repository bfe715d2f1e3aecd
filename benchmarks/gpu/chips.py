"""What a GPU can do at most, and which share of it a measurement reaches.

Peaks are those of NVIDIA's data sheets for dense matrices (half of what they print "with sparsity"), with sums in fp32;
GeForce cards are listed for that case in the architecture white papers. They are for the boost clock, which no chip
holds under load: a very good kernel reaches 0.7 to 0.8 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BYTES = {"bf16": 2.0, "fp8": 1.0, "nvfp4": 0.5 + 1 / 16}  # of one number of an operand, its share of block scales too


@dataclass(frozen=True)
class Peak:
    """Dense rates of the matrix units in TFLOP/s, by the type of the operands, and bandwidth of the memory in TB/s."""

    bf16: float
    fp8: float
    bandwidth: float
    nvfp4: float | None = None

    def tflops(self, kind: str) -> float | None:
        rates: dict[str, float | None] = {"bf16": self.bf16, "fp8": self.fp8, "nvfp4": self.nvfp4}
        return rates[kind]


# The first name whose words are part of the device's name counts.
PEAKS = {
    "H200 NVL": Peak(835.5, 1671.0, 4.8),
    "H200": Peak(989.4, 1978.9, 4.8),
    "H100 PCIe": Peak(756.4, 1512.9, 2.0),
    "H100 NVL": Peak(835.5, 1671.0, 3.9),
    "H100": Peak(989.4, 1978.9, 3.35),
    "GB200": Peak(2500.0, 5000.0, 8.0, 10000.0),
    "B200": Peak(2250.0, 4500.0, 8.0, 9000.0),
    "L40S": Peak(362.1, 733.0, 0.864),
    "RTX 5090": Peak(209.5, 419.0, 1.792, 1676.0),
    "RTX 4090": Peak(165.2, 330.3, 1.008),
    "L4": Peak(121.0, 242.0, 0.3),
}


def peak_of(chip: str) -> Peak | None:
    """Peak of the device that torch calls `chip`; None for one that is not in the table."""
    return next((peak for name, peak in PEAKS.items() if f" {name} " in f" {chip} "), None)


@dataclass(frozen=True)
class Gemm:
    """`[m, k] @ [k, n]` with a bf16 result."""

    m: int
    n: int
    k: int

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k

    def bytes(self, kind: str) -> float:
        """Least traffic with memory: every operand is read once and the result is written once."""
        return (self.m * self.k + self.n * self.k) * BYTES[kind] + self.m * self.n * 2.0

    def floor_seconds(self, kind: str, peak: Peak) -> float | None:
        """Least time with operands of `kind`: that of the arithmetic or of the memory, the longer of the two."""
        rate = peak.tflops(kind)
        return max(self.flops / rate, self.bytes(kind) / peak.bandwidth) / 1e12 if rate else None


@dataclass(frozen=True)
class Machine:
    """The device of a run. Everything but `device` is None on a CPU.

    Attributes:
        chip: name that torch gives it.
        capability: compute capability.
        l2_bytes: size of the last cache before memory.
        memory_gb: of the device.
    """

    device: torch.device
    chip: str | None = None
    capability: tuple[int, int] | None = None
    l2_bytes: int | None = None
    memory_gb: float | None = None

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        if device.type != "cuda":
            return cls(device)
        properties = torch.cuda.get_device_properties(device)
        return cls(
            device,
            properties.name,
            torch.cuda.get_device_capability(device),
            properties.L2_cache_size,
            round(properties.total_memory / 1e9, 1),
        )

    @property
    def peak(self) -> Peak | None:
        return peak_of(self.chip) if self.chip else None

    @property
    def label(self) -> str:
        """Name for files: "h200", "h100_80gb_hbm3", "cpu"."""
        if self.chip is None:
            return self.device.type
        words = self.chip.lower().replace("-", " ").replace("/", " ").split()
        return "_".join(word for word in words if word not in ("nvidia", "geforce"))
