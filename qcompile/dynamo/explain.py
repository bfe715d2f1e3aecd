"""`qcompile.explain`: what `torch.compile(backend="qcompile")` made of a model, as tables and as data."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field
from rich.console import Console

from passes.base import Decline
from passes.lower.device import Device
from passes.lower.kernels import kernels
from qcompile.dynamo.inputs import Main
from qcompile.dynamo.left import layers_left, models_seen
from qcompile.dynamo.middle import Lowered
from qcompile.dynamo.models import modules_of
from qcompile.dynamo.options import Options
from qcompile.dynamo.registry import graphs_of, nothing_compiled
from qcompile.report.base import ModelReport, ReportBase
from qcompile.report.tables import show_explanation


class CompileReport(ModelReport):
    """What became of one graph.

    Attributes:
        recipe, target, device: what it was compiled with and for.
        quantized, unquantized, reasons, coverage: as in `qcompile.Report`.
        kernels: module path -> what a quantized linear layer runs as.
        dropped: module path -> what was quantized in the program and is not here, as no kernel gains from it.
        declined: places that a pass looked at and left, with the reason.
        fired: pass -> number of rewrites.
        notices: of the recipe, and of numbers that the dtype holds badly.
        weight_bytes: what the compiled graph reads of weights, codes and scales.
        seconds: of passes (codes included) and of the target's compiler.
    """

    kind: Literal["graph"] = "graph"
    target: str
    device: str
    kernels: dict[str, str]
    dropped: dict[str, str]
    fired: dict[str, int]
    weight_bytes: int
    seconds: dict[str, float]


class Explanation(ReportBase):
    """What `qcompile.explain` returns; printed, it is a table.

    Attributes:
        graphs: one report for each graph that was compiled, in that order: graph breaks and recompiles make several.
        left: module path -> why, of each layer that is in none of them, or that a call ran without them.
    """

    kind: Literal["compile"] = "compile"
    graphs: list[CompileReport]
    left: dict[str, str] = Field(default_factory=dict)

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

    def __str__(self) -> str:
        text = io.StringIO()
        show_explanation(Console(file=text, width=120), self.data())
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
    return Explanation(graphs=[report for reports in graphs.values() for report in reports], left=left or {})


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
        quantized=lowered.modules.quantized,
        unquantized=lowered.modules.unquantized,
        reasons=lowered.modules.reasons,
        coverage=lowered.modules.coverage,
        kernels={kernel.layer: kernel.kernel for kernel in found},
        dropped={kernel.layer: kernel.dropped for kernel in found if kernel.dropped},
        declined=lowered.log.declined,
        fired=dict(lowered.log.fired),
        notices=lowered.notices,
        weight_bytes=sum(fake.numel() * fake.itemsize for fake in fakes),
        seconds=dict(seconds),
    )
