"""The low-rank parts of a program: what they cost."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict
from torch.fx import GraphModule

from passes.graph import aten, shape, val
from passes.operators import operator_of
from passes.place.low_rank import SplitProduct
from passes.quantize.sites import linear_name
from passes.subgraphs import all_calls

__all__ = ["KIND", "WHY", "LowRankCost", "low_rank_costs"]

KIND = "low_rank"  # what reports call a product of one, which `coverage` does not count
WHY = "low-rank part of a quantized weight, which stays in the dtype that the program computes in"


class LowRankCost(BaseModel):
    """What the low-rank part of the weights that share a first factor takes.

    Attributes:
        modules: the linear layers. rank: of the part, of all of them together.
        bytes: of the factors. weight_bytes: of the whole weights in the same dtype.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    modules: list[str]
    rank: int
    bytes: int
    weight_bytes: int


def low_rank_costs(gm: GraphModule) -> Iterator[LowRankCost]:
    """One for each first factor, in the order of the graph; a layer that is called twice counts once."""
    found: dict[str, dict[str, tuple[SplitProduct, int]]] = {}
    for layer in all_calls(gm, aten.linear.default):
        if (split := SplitProduct.read(layer)) is not None and (row := operator_of(layer)) is not None:
            weight = row.weight(layer)
            assert weight is not None
            elements = int(shape(weight)[0]) * int(shape(weight)[1])
            found.setdefault(str(split.down.target), {})[linear_name(layer)] = split, elements
    for layers in found.values():
        splits = [split for split, _ in layers.values()]
        down = val(splits[0].down)
        factors = down.numel() + sum(val(split.up).numel() for split in splits)
        weights = sum(elements for _, elements in layers.values())
        size = down.dtype.itemsize
        yield LowRankCost(modules=[*layers], rank=int(down.shape[0]), bytes=factors * size, weight_bytes=weights * size)
