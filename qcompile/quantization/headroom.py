"""How near the tensors of a model come to the end of the dtype that its program computes in, and which go beyond."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.fx import GraphModule, Node

from passes.graph import aten, is_call, module_path, strip
from passes.legalize.compute_dtype import ConvertComputeDtype
from passes.legalize.masked_rows import masked_attentions
from passes.legalize.ranges import SAME_ELEMENTS, before_softmax, beyond, is_passing, softmax_axis
from passes.sdpa import SDPA, attention_scale
from passes.subgraphs import all_calls, all_nodes, copied_graph, graphs
from qcompile.algorithms.statistics import (
    FullyMasked,
    Histogram,
    Largest,
    LargestBeforeSoftmax,
    LargestScore,
    Statistic,
)
from qcompile.errors import CalibrationError
from qcompile.messages import some
from qcompile.report.headroom import Headroom

__all__ = ["NEAR", "Headroom", "Watch"]

_UNWRITTEN = (
    *(aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default),
    *(aten.new_empty.default, aten.new_empty_strided.default),
)
NEAR = 2.0  # other data, and quantization, can give that much more than calibration saw


class Watch:
    """What calibration runs, whose largest magnitude it keeps, and the masks that it looks at.

    For a program in float16 that is everything that float16 might not hold, in a copy of the model's graph that
    computes as the program will, quantizers aside: there masks and numbers have the size that they will have, and what
    stays in a wider dtype is of no concern. In the other dtypes it is what quantizers see.

    Attributes:
        gm: the graph to run, with halves widened to float32.
        statistics: node of `gm` -> the ranges to keep of it.
        masks: mask of an attention in `gm` -> whether it hid all.
    """

    def __init__(self, gm: GraphModule, source: torch.dtype, target: torch.dtype) -> None:
        """`source` is the dtype of the model, `target` that of its program."""
        self.source, self.target = source, target
        self.gm: GraphModule = gm
        self.statistics: dict[Node, list[Largest]] = defaultdict(list)
        self.masks: dict[Node, FullyMasked] = {}
        self._others: dict[Node, list[Statistic]] = defaultdict(list)
        self._copies: Mapping[Node, Node] = {}
        if target is torch.float16:
            if source != target:
                self._convert(gm)
            self._watch_all()
        masked = (found for part in graphs(gm) for found in masked_attentions(part))
        self._masked = {node: self._mask(mask) for node, mask in masked}

    @property
    def watched(self) -> dict[Node, list[Statistic]]:
        """All that is kept, by the node of `gm` that it is kept of."""
        found: dict[Node, list[Statistic]] = {node: list(kept) for node, kept in self.statistics.items()}
        for node, mask in self.masks.items():
            found.setdefault(node, []).append(mask)
        for node, others in self._others.items():
            found.setdefault(node, []).extend(others)
        return found

    @property
    def fully_masked(self) -> set[Node]:
        """The attentions of the model's graph whose mask hid every key from some query."""
        return {node for node, mask in self._masked.items() if mask.found}

    @property
    def converted(self) -> bool:
        """Whether `gm` is a copy, with halves that the model has not."""
        return bool(self._copies)

    def keep(self, tensor: Node, statistic: Statistic) -> Statistic:
        """Keep `statistic` of `tensor`, a node of the model's graph, and return it; or one that tells as much and is
        kept anyhow.
        """
        node = self._copies.get(tensor, tensor)
        if not isinstance(statistic, Largest) or type(statistic) not in (Largest, Histogram):
            self._others[node].append(statistic)
            return statistic
        kept = self.statistics[strip(node, *SAME_ELEMENTS)]
        for index, known in enumerate(kept):
            if type(known) is Histogram or type(known) is type(statistic):
                return known
            if type(known) is Largest:
                kept[index] = statistic
                return statistic
        kept.append(statistic)
        return statistic

    def drop(self, statistic: Statistic) -> None:
        """Let go what `keep` was asked for, unless it is kept anyhow."""
        for node, others in self._others.items():
            self._others[node] = [other for other in others if other is not statistic]

    def _mask(self, mask: Node) -> FullyMasked:
        return self.masks.setdefault(self._copies.get(mask, mask), FullyMasked())

    def check(self) -> list[str]:
        """What to say of the tensors that left the dtype, or nearly did.

        Raises:
            CalibrationError: one did that the model holds.
        """
        if self.target is not torch.float16:
            return []
        found = list(self._found())
        over, near = [h for h in found if h.factor < 1], [h for h in found if 1 <= h.factor < NEAR]
        if over and self.source != self.target:
            raise CalibrationError(
                f"calibration saw numbers that the program cannot hold in {_told(over)}: {beyond(self.target)}"
            )
        notices = []
        if over:
            notices.append(
                f"in calibration this model itself left the range of its dtype in {_told(over)}: it computes infinities"
                f" there, and so does the program; {beyond(self.target)}"
            )
        if near:
            notices.append(
                f"calibration came within a factor of {min(h.factor for h in near):.2f} of the largest number of"
                f" {self.target} in {_told(near)}: other inputs may overflow there, in bfloat16 they do not"
            )
        return notices

    def headroom(self) -> list[Headroom]:
        """What was seen of each tensor, the one with the least headroom first."""
        return sorted(self._found(), key=lambda h: h.factor)

    def _found(self) -> Iterator[Headroom]:
        """In the order of the graph."""
        limit = float(torch.finfo(self.target).max)
        for node in all_nodes(self.gm):
            for statistic in self.statistics.get(node, ()):
                if statistic.finite:
                    name = strip(node, aten._to_copy.default).name
                    name += " (scores)" if isinstance(statistic, LargestScore) else ""
                    yield Headroom(module_path(node), name, statistic.finite, limit / statistic.finite)

    def _convert(self, gm: GraphModule) -> None:
        copies: dict[Node, Node] = {}
        self.gm, self._copies = copied_graph(gm, copies), copies
        ConvertComputeDtype(self.source, self.target)(self.gm)

    def _watch_all(self) -> None:
        hidden = {node for part in graphs(self.gm) for node in before_softmax(part.graph)}
        limit = float(torch.finfo(self.target).max)
        bounded: set[Node] = set()
        for node in all_nodes(self.gm):
            value = node.meta.get("val")
            operands = {n for n in node.all_input_nodes if _is_float(n)}
            if node.op == "get_attr" or is_call(node, *_UNWRITTEN) or (is_passing(node) and operands <= bounded):
                bounded.add(node)  # the pass that casts constants checks them, and what memory held is no value
            elif isinstance(value, torch.Tensor) and value.dtype is self.target:
                bounded.add(node)
                in_scores = node in hidden
                statistic = LargestBeforeSoftmax(softmax_axis(node), limit) if in_scores else Largest()
                self.statistics[node].append(statistic)
        for node in all_calls(self.gm, SDPA):
            if isinstance(query := node.args[0], Node) and query.meta["val"].dtype is self.target:
                self.statistics[node].append(LargestScore(attention_scale(node), limit / NEAR))


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(v, torch.Tensor) and v.dtype.is_floating_point for v in values)


def _told(found: Sequence[Headroom]) -> str:
    """The modules of `found`, each with its largest number, in the order that they are met."""
    largest: dict[str, Headroom] = {}
    for h in found:
        key = h.module or h.tensor
        if key not in largest or largest[key].amax < h.amax:
            largest[key] = h
    return some([str(h) for h in largest.values()])
