"""Whether a convolution on codes is faster than in half precision: arithmetic that it saves against bytes that it adds.

On codes the matrix units do twice the products, and input and weight are half the bytes. But the kernel in front of a
convolution writes half precision, so that a kernel of its own quantizes the input: it reads two bytes for each element
and writes one. A scale for each channel of the weight makes the convolution write float32, and a kernel behind it reads
that. (TensorRT-RTX 1.7.1; in its layer lists.)

All is counted in bytes that the memory moves in that time:

    half = max(2 products / BALANCE, 2 (input + weight + output))
    low  = max(products / BALANCE, input + weight + 2 output) + 3 input            per tensor
    low  = max(products / BALANCE, input + weight + 4 output) + 3 input + 4 output per channel

It pays where `half / low` is LEAST_GAIN and `half - low` LEAST_SAVING. How many kernels there are depends on the
neighbors: `passes.added_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from passes.graph import shape

__all__ = ["BALANCE", "LEAST_GAIN", "LEAST_SAVING", "Roofline"]

# Floating-point operations in half precision for each byte of memory, dense and with sums in float32, by what NVIDIA
# publishes: RTX 5090 209.5e12 / 1792e9 = 117, RTX 4090 165.2e12 / 1008e9 = 164, RTX PRO 6000 Blackwell 281, H100 SXM
# 989.5e12 / 3350e9 = 295, L4 121e12 / 300e9 = 403. One in the middle, as a program knows no target: twice as many
# products pay a third earlier or later.
BALANCE = 200.0
LEAST_GAIN = 1.1
"""What is less than a tenth is less than the roofline knows."""
LEAST_SAVING = 1e5
"""In bytes: a tenth of a microsecond at 1e12 a second. A kernel takes about one to start, so that what saves less than
this, a convolution of one pixel in a squeeze and excitation, saves nothing by the kernel that it adds."""


@dataclass(frozen=True)
class Roofline:
    """Sizes of a convolution, in elements.

    Attributes:
        products: multiplications. input, weight, output: elements of these.
    """

    products: float
    input: float
    weight: float
    output: float

    @classmethod
    def of(cls, call: Node) -> Roofline:
        """Of a call of `aten.convolution`, with the sizes of the example inputs where they are dynamic."""
        x, weight = call.args[:2]
        assert isinstance(x, Node) and isinstance(weight, Node)
        sizes = [_elements(node) for node in (x, weight, call)]
        per_output = sizes[1] / max(1.0, float(_number(shape(weight)[0])))
        return cls(sizes[2] * per_output, *sizes)

    @property
    def moved(self) -> float:
        """Bytes that it reads and writes in half precision."""
        return 2 * (self.input + self.weight + self.output)

    def moved_on_codes(self, per_channel: bool) -> float:
        """The same on codes of 8 bits, with the kernels that it adds."""
        written = (4 if per_channel else 2) * self.output
        return self.input + self.weight + written + self._added(per_channel)

    def _added(self, per_channel: bool) -> float:
        """Bytes that the kernels before it, and behind it with a scale for each channel, move."""
        return 3 * self.input + (4 * self.output if per_channel else 0)

    @property
    def half(self) -> float:
        """Bytes that the memory moves in the time that it takes in half precision."""
        return max(2 * self.products / BALANCE, self.moved)

    def low(self, per_channel: bool) -> float:
        """The same on codes of 8 bits, with the kernels that it adds."""
        return max(self.products / BALANCE + self._added(per_channel), self.moved_on_codes(per_channel))

    def gain(self, per_channel: bool) -> float:
        """How many times faster it is on codes."""
        return self.half / self.low(per_channel)

    def pays(self, per_channel: bool) -> bool:
        """Whether what it gains is worth a kernel."""
        return self.gain(per_channel) >= LEAST_GAIN and self.half - self.low(per_channel) >= LEAST_SAVING

    @property
    def intensity(self) -> float:
        """Floating-point operations for each byte in half precision."""
        return self.products / max(1.0, self.input + self.weight + self.output)


def _elements(node: Node) -> float:
    count = 1.0
    for size in shape(node):
        count *= _number(size)
    return count


def _number(size: object) -> int:
    """A size, or that of the example where it is symbolic."""
    if isinstance(size, int):
        return size
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(hint) if isinstance(hint, int) else 1
