"""`convolutions: where_it_pays`: which convolutions a roofline has on codes, so that each adds one kernel at most."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from passes.added_kernels import AddedKernels, OnCodes
from passes.quantize.sites import Site
from passes.roofline import BALANCE, LEAST_GAIN, LEAST_SAVING, Roofline
from qcompile.schemes.config import QuantizerConfig

__all__ = ["none_pays", "unpaid"]

_ALL = "`convolutions: all` has it quantized"


def unpaid(configs: Mapping[Site, QuantizerConfig]) -> dict[Site, str]:
    """The weights of convolutions that do not pay on codes -> why.

    Args:
        configs: of the operands of convolutions that could be quantized.
    """
    weights = {site: config for site, config in configs.items() if site.operand == "weight"}
    ways = {s.consumer: OnCodes(c.format, c.granularity == "per_channel") for s, c in weights.items()}
    rooflines = {call: Roofline.of(call) for call in ways}
    choice = Choice(ways, {call for call, way in ways.items() if rooflines[call].pays(way.per_channel)})
    choice.settle()
    found: dict[Site, str] = {}
    for site in weights:
        call = site.consumer
        if call not in choice.chosen:
            per_channel = ways[call].per_channel
            what = choice.dropped.get(call) or _numbers(rooflines[call], per_channel)
            gain = rooflines[call].gain(per_channel)
            found[site] = (
                f"it would not pay: {gain:.2f} times as fast as in half precision by the roofline, {what}; {_ALL}"
            )
    return found


def none_pays(left: Mapping[Site, str], kept: Mapping[Site, QuantizerConfig]) -> str | None:
    """What to say of a model none of whose convolutions pays; None if one does, or nothing else is quantized either,
    which is said elsewhere.

    Args:
        left: what `unpaid` gives. kept: the quantizers of the model that are on.
    """
    if not left or not kept or any(site.operator.kind == "convolution" for site in kept):
        return None
    site = max(left, key=lambda site: Roofline.of(site.consumer).gain(per_channel=False))
    count = "the convolution" if len(left) == 1 else f"none of the {len(left)} convolutions"
    return (
        f"{count} is {'not ' * (len(left) == 1)}quantized: `convolutions: where_it_pays`, and none pays. Nearest is"
        f" {site.module or 'the root'}: {left[site].removesuffix(f'; {_ALL}')}. To quantize all: `--set"
        ' convolutions=all`, or `load_recipe(NAME, ["convolutions=all"])`'
    )


def _numbers(roofline: Roofline, per_channel: bool) -> str:
    if roofline.gain(per_channel) >= LEAST_GAIN:
        saved = roofline.half - roofline.low(per_channel)
        return f"but {saved:.2g} bytes are less than a kernel more costs, where {LEAST_SAVING:.2g} may pay"
    return f"{roofline.intensity:.3g} operations for each byte, where a GPU has {BALANCE:.0f}"


@dataclass
class Choice:
    """A set of convolutions, those that pay at first, and how it is made to add one kernel for each at most.

    Attributes:
        ways: all that could be on codes -> how. chosen: those that are to be.
        dropped: those that were chosen, and are so no longer -> why.
    """

    ways: Mapping[Node, OnCodes]
    chosen: set[Node]
    dropped: dict[Node, str] = field(default_factory=dict)

    def settle(self) -> None:
        """Until no run of neighbors adds more kernels than it has convolutions: have another one join that adds none,
        such as the convolution of a skip branch, or leave out what adds two, or all of the run.

        It ends, as what was dropped does not come back.
        """
        while run := self._over():
            if (more := self._joining(run)) is not None:
                self.chosen.add(more)
                continue
            dear = [call for call in run if self._count(self.chosen - {call}) < self._count(self.chosen) - 1]
            self._drop(dear[:1] or run, run)

    def _over(self) -> list[Node] | None:
        kernels = self._kernels()
        return next((run for run in kernels.runs() if kernels.excess(run) > 0), None)

    def _drop(self, calls: Collection[Node], run: Collection[Node]) -> None:
        kernels = len(self._kernels().of(run))
        alone = f"it and {len(run) - 1} beside it add {kernels}" if len(run) > 1 else f"it adds {kernels}"
        why = f"but {alone} kernels, before and behind, where one for each convolution may be"
        self.chosen -= set(calls)
        self.dropped |= dict.fromkeys(calls, why)

    def _joining(self, run: list[Node]) -> Node | None:
        """Another convolution that has part in the kernels of `run`, and adds none."""
        for call in self.ways:
            if call in self.chosen or call in self.dropped:
                continue
            more = self._kernels({*self.chosen, call})
            touched = more.touched(call)
            if all(touched.isdisjoint(more.touched(one)) for one in run):
                continue
            if len(more.of(more.chosen)) <= self._count(self.chosen):
                return call
        return None

    def _kernels(self, chosen: Collection[Node] | None = None) -> AddedKernels:
        chosen = self.chosen if chosen is None else chosen
        return AddedKernels({call: way for call, way in self.ways.items() if call in chosen})

    def _count(self, chosen: Collection[Node]) -> int:
        kernels = self._kernels(chosen)
        return len(kernels.of(kernels.chosen))
