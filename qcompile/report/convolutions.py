"""What the roofline says of each convolution of a program: whether codes pay, and by how much."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict
from torch.fx import GraphModule

from passes.operators import CONVOLUTION, of_kind, operator_of
from passes.quantize.sites import linear_name
from passes.reading import QuantizedLayer
from passes.roofline import Roofline
from passes.subgraphs import all_calls

__all__ = ["ConvolutionEstimate", "estimates"]


class ConvolutionEstimate(BaseModel):
    """One convolution, chosen or left, at the sizes of the example inputs, by `passes.roofline`.

    Attributes:
        module: its path. format: of its weight and input; empty where it stays in floating point.
        operations: multiplications and additions. intensity: of these for each byte in half precision.
        bytes: that it reads and writes in half precision. bytes_on_codes: with 8 bits and one scale for the weight,
            with the kernel that quantizes its input.
        gain, gain_per_channel: how many times faster it is on codes, with one scale for the weight, or one for each
            channel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    format: str
    operations: float
    intensity: float
    bytes: float
    bytes_on_codes: float
    gain: float
    gain_per_channel: float


def estimates(gm: GraphModule) -> Iterator[ConvolutionEstimate]:
    """One for each call of a convolution that is not transposed, in the order of the graph."""
    for call in all_calls(gm, *of_kind(CONVOLUTION.kind)):
        if operator_of(call) is not CONVOLUTION:
            continue
        roofline, layer = Roofline.of(call), QuantizedLayer.read(call)
        on_codes = layer is not None and layer.input is not None
        yield ConvolutionEstimate(
            module=linear_name(call),
            format=layer.weight.format.name if layer is not None and on_codes else "",
            operations=2 * roofline.products,
            intensity=roofline.intensity,
            bytes=roofline.moved,
            bytes_on_codes=roofline.moved_on_codes(per_channel=False),
            gain=roofline.gain(per_channel=False),
            gain_per_channel=roofline.gain(per_channel=True),
        )
