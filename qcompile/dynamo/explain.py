"""`qcompile.explain`: what `torch.compile(backend="qcompile")` made of a model, as tables and as data."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from passes.base import Decline
from passes.lower.device import Device
from passes.lower.kernels import kernels
from qcompile.dynamo.inputs import Main
from qcompile.dynamo.left import layers_left, models_seen
from qcompile.dynamo.middle import Lowered
from qcompile.dynamo.models import modules_of
from qcompile.dynamo.options import Options
from qcompile.dynamo.registry import graphs_of, nothing_compiled
from qcompile.tables import show_coverage, show_declines, show_notices, show_rows, size


@dataclass(frozen=True)
class CompileReport:
    """What became of one graph.

    Attributes:
        recipe, target, device: what it was compiled with and for.
        quantized, unquantized, coverage: as in `qcompile.Report`.
        kernels: module path -> what a quantized linear layer runs as.
        dropped: module path -> what was quantized in the program and is not here, as no kernel gains from it.
        declined: places that a pass looked at and left, with the reason.
        fired: pass -> number of rewrites.
        notices: of the recipe, and of numbers that the dtype holds badly.
        weight_bytes: what the compiled graph reads of weights, codes and scales.
        seconds: of passes (codes included) and of the target's compiler.
    """

    recipe: str
    target: str
    device: str
    quantized: Mapping[str, str]
    unquantized: Mapping[str, str]
    coverage: Mapping[str, tuple[int, int]]
    kernels: Mapping[str, str]
    dropped: Mapping[str, str]
    declined: Sequence[Decline]
    fired: Mapping[str, int]
    notices: Sequence[str]
    weight_bytes: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Explanation:
    """What `qcompile.explain` returns; printed, it is a table.

    Attributes:
        graphs: one report for each graph that was compiled, in that order: graph breaks and recompiles make several.
        left: module path -> why, of each layer that is in none of them, or that a call ran without them.
    """

    graphs: Sequence[CompileReport]
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def quantized(self) -> dict[str, str]:
        """Module path -> format, over all graphs."""
        return {path: form for graph in self.graphs for path, form in graph.quantized.items()}

    @property
    def unquantized(self) -> dict[str, str]:
        """Module path -> what it is, over all graphs; of a layer that Dynamo left alone, why."""
        return {path: kind for graph in self.graphs for path, kind in graph.unquantized.items()} | dict(self.left)

    @property
    def kernels(self) -> dict[str, str]:
        """Module path -> what its product runs as, over all graphs."""
        return {path: kernel for graph in self.graphs for path, kernel in graph.kernels.items()}

    @property
    def declined(self) -> list[Decline]:
        """Places that passes looked at and left, over all graphs."""
        return [decline for graph in self.graphs for decline in graph.declined]

    def to_json(self) -> str:
        """`graphs` and `left` as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=120)
        for index, graph in enumerate(self.graphs):
            _show(console, index, graph)
        show_rows(console, "In no graph, unquantized", ("module", "why"), list(self.left.items()))
        return text.getvalue().rstrip()


def explain(compiled: Callable[..., Any] | None = None) -> Explanation:
    """What the graphs of a compiled model or function were made into.

    Args:
        compiled: what `torch.compile(..., backend="qcompile")` returned, called at least once; a module or function
            that it was made of; None for all that this process has compiled.

    Raises:
        CompileError: nothing was compiled for it yet.
    """
    graphs = graphs_of(compiled)
    read = [weight for graph in graphs for weight in graph.weights()]
    left = layers_left(models_seen() if compiled is None else modules_of(compiled), read)
    if not graphs and left is None:
        raise nothing_compiled()
    return Explanation([report for reports in graphs.values() for report in reports], left or {})


def report_of(
    lowered: Lowered, main: Main, options: Options, device: Device, seconds: Mapping[str, float]
) -> CompileReport:
    """The report of a graph that was compiled."""
    fakes = [f for f, _ in zip(reversed(main.fakes), main.constants, strict=False)]
    capability = "" if device.capability is None else f" {device.capability[0]}.{device.capability[1]}"
    found = kernels(lowered.gm)
    return CompileReport(
        recipe=options.recipe.metadata.name if options.recipe else "",
        target=options.target,
        device=device.type + capability,
        quantized=lowered.quantized,
        unquantized=lowered.unquantized,
        coverage=lowered.coverage,
        kernels={kernel.layer: kernel.kernel for kernel in found},
        dropped={kernel.layer: kernel.dropped for kernel in found if kernel.dropped},
        declined=lowered.log.declined,
        fired=dict(lowered.log.fired),
        notices=lowered.notices,
        weight_bytes=sum(fake.numel() * fake.itemsize for fake in fakes),
        seconds=seconds,
    )


def _show(console: Console, index: int, graph: CompileReport) -> None:
    head = ", ".join(filter(None, (graph.recipe and f"recipe {graph.recipe}", f"target {graph.target}", graph.device)))
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in graph.seconds.items())
    console.print(Text(f"Graph {index}: {head}; weights {size(graph.weight_bytes)}; {times}", style="bold"))
    show_coverage(console, vars(graph))
    show_rows(console, "Kernels", ("runs as", "layers"), Counter(graph.kernels.values()).most_common())
    show_rows(console, "In the model's own precision", ("module", "why"), list(graph.dropped.items()))
    show_declines(console, [dataclasses.asdict(decline) for decline in graph.declined])
    show_notices(console, graph.notices)
