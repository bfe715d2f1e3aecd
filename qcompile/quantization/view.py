"""What algorithms see of a graph: `qcompile.algorithms.base.View` of sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from passes.constants import ConstantRows
from passes.graph import shape
from passes.groups import parallel, reads
from passes.legalize.scales import round_scale
from passes.quantize.sites import Site
from passes.subgraphs import owner
from qcompile.algorithms.base import Operand, View
from qcompile.algorithms.scales import has_constant
from qcompile.recipe import QuantizerConfig


@dataclass(frozen=True, eq=False)
class GraphOperand(Operand):
    """A tensor of a graph.

    Attributes:
        at: where it is. target: the dtype that the program will compute in.
    """

    at: Site
    target: torch.dtype

    @property
    def site(self) -> Site:
        return self.at

    @property
    def dtype(self) -> torch.dtype:
        return self.target

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(shape(self.at.tensor))

    @property
    def reduced_axes(self) -> tuple[int, ...]:
        return self.at.operator.reduced_axes(self.at.consumer)

    def rows(self, multiple: int = 1) -> Iterator[tuple[slice, torch.Tensor]]:
        yield from ConstantRows(owner(self.at.tensor), self.at.tensor, multiple)

    def stored(self, scale: torch.Tensor) -> torch.Tensor:
        return round_scale(scale, self.target)[0]


def graph_view(
    gm: GraphModule,
    configs: Mapping[Site, QuantizerConfig],
    target: torch.dtype,
    every: Mapping[Site, QuantizerConfig] | None = None,
) -> View:
    """The view of what `configs` quantizes in `gm`, with scales that are to be found; `every` has all that is."""
    operands = [GraphOperand(site.name, site.operand, config, site, target) for site, config in configs.items()]
    return View(operands, _groups(operands), gm=gm, configs=configs if every is None else every)


def _groups(operands: list[GraphOperand]) -> list[list[Operand]]:
    """Weights with one (global) scale whose layers belong to one module and read the same tensor."""
    weights = [o for o in operands if o.kind == "weight" and o.site.operator.gemm]
    shared = [o for o in weights if not o.per_channel and has_constant(o.config)]
    groups = parallel(shared, lambda operand: reads(operand.site.consumer, operand.config.format))
    return [list[Operand](group) for group in groups if group[1:]]
