"""What calibration data shows of a graph: walked once for all that is wanted of it, and again if the graph changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from qcompile.algorithms.growth import RangeLog
from qcompile.algorithms.observe import observe
from qcompile.algorithms.share import WHOLE, Share
from qcompile.algorithms.statistics import Largest, Statistic
from qcompile.capture.batches import PlacedBatches, batch_count
from qcompile.process import alone
from qcompile.quantization.headroom import Watch


class Observation:
    """Runs batches through a graph, and keeps what algorithms watch; the first walk also sees how near numbers come to
    the end of the compute dtype, and what masks hide.

    Attributes:
        watch: of the last walk that looked at the graph as it is now.
        notices: what the user should know of the data. batches_seen, samples: how many. asked: whether an algorithm
            watched something.
        ranges: how the ranges grew over them, of the first walk through the graph as it is now.
    """

    def __init__(
        self,
        gm: GraphModule,
        program: ExportedProgram,
        batches: Iterable[Any],
        dtypes: tuple[torch.dtype, torch.dtype],
        *,
        again: bool,
        progress: bool,
        share: Share = WHOLE,
    ) -> None:
        """`dtypes` are those of the model and of the program; `again`: the batches may be needed more than once;
        `share`: those of them that are seen here."""
        self.share = share
        self.gm, self.program, self.dtypes, self.progress = gm, program, dtypes, progress
        self.batches: Iterable[Any] = list(batches) if again and isinstance(batches, Iterator) else batches
        self.watch: Watch | None = None
        self.notices: list[str] = []
        self.batches_seen = 0
        self.samples: int | None = None
        self.ranges: RangeLog | None = None
        self.asked = False
        self._kept: dict[Node, list[Statistic]] = {}
        self._stands: dict[Statistic, Statistic] = {}  # what was asked for -> what is kept for it

    def forget(self) -> None:
        """The graph is another now."""
        self.watch, self._kept, self._stands, self.ranges = None, {}, {}, None

    def of(self, wanted: Mapping[Node, Statistic], also: Mapping[Node, Statistic]) -> dict[Node, Statistic]:
        """What is kept of the nodes in `wanted`; if data has to be walked for it, keep `also` for later, too."""
        self.asked = self.asked or bool(wanted)
        if self.watch is None or any(self._known(node, kind) is None for node, kind in wanted.items()):
            self._walk([*wanted.items(), *also.items()])
        return {node: self._known(node, kind) or kind for node, kind in wanted.items()}

    def drop(self, wanted: Mapping[Node, Statistic]) -> None:
        """Let go what was kept for `wanted`."""
        for node, kind in wanted.items():
            kept = self._stands.pop(kind, None)
            self._kept[node] = [other for other in self._kept.get(node, []) if other is not kept]
            if self.watch is not None and kept is not None:
                self.watch.drop(kept)

    def through(self, gm: GraphModule, kept: Mapping[Node, Statistic]) -> None:
        """Update what is kept of another graph with all data."""
        self.asked = True
        statistics = {node: [statistic] for node, statistic in kept.items()}
        ranges = RangeLog(kept.values(), batch_count(self.batches), self.share.count)
        options: dict[str, Any] = {"widen": True, "progress": self.progress, "share": self.share, "ranges": ranges}
        log = observe(gm, self.program, statistics, self.batches, **options)
        self.samples, self.notices = log.samples, log.notices()

    def _known(self, node: Node, wanted: Statistic) -> Statistic | None:
        """Every kind of `Largest` tells the largest magnitude; of the others each is asked for what it is."""
        if type(wanted) is Largest:
            return next((kept for kept in self._kept.get(node, []) if isinstance(kept, Largest)), None)
        return self._stands.get(wanted)

    def _walk(self, wanted: list[tuple[Node, Statistic]]) -> None:
        with alone():
            watch = Watch(self.gm, *self.dtypes)
        wanted.sort(key=lambda item: type(item[1]) is Largest)  # which others can stand for
        for node, statistic in wanted:
            self._stands[statistic] = watch.keep(node, statistic)
            self._kept.setdefault(node, []).append(self._stands[statistic])
        self.watch = watch
        if not watch.watched:
            return
        ranges = RangeLog(self._stands.values(), batch_count(self.batches), self.share.count)
        options: dict[str, Any] = {"widen": watch.converted, "progress": self.progress, "share": self.share}
        options["ranges"] = ranges
        log = observe(watch.gm, self.program, watch.watched, self.batches, **options)
        ranges.end()
        told = self.batches.notices if isinstance(self.batches, PlacedBatches) else ()
        self.batches_seen = log.batches
        self.samples, self.notices, self.ranges = log.samples, [*told, *log.notices()], self.ranges or ranges
