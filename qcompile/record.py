"""What `quantize` notes on a program for the reports of the back ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from passes.base import Decline
from qcompile.headroom import Headroom

UNREACHED = "Calibration"  # what declined a layer that calibration gave no range, instead of the name of a pass
SITES = "Sites"  # what declined a layer that no input reaches, or that gains nothing
_META = "qcompile"  # key of the record in program.graph_module.meta


@dataclass
class QuantizeRecord:
    """What `quantize` did, kept with the program for reports, also when it is saved and loaded.

    Attributes:
        recipe: name of the recipe.
        fired: pass -> number of rewrites.
        declined: what passes left as it was, and why.
        notices: rules of the recipe that had no effect, or that say why they are there; and what the user should know
            of the calibration data and of numbers that the compute dtype holds badly.
        headroom: how near each tensor that calibration saw came to the end of the compute dtype, the nearest first.
        calibration: what the ranges of activations were found on: `512 samples`.
        dimensions: symbol of a dynamic dimension -> what the user called it.
    """

    recipe: str = ""
    fired: Mapping[str, int] = field(default_factory=dict)
    declined: list[Decline] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    headroom: list[Headroom] = field(default_factory=list)
    calibration: str = ""
    dimensions: Mapping[str, str] = field(default_factory=dict)


def record(program: ExportedProgram, what: QuantizeRecord) -> None:
    """Keep `what` with `program`: for `torch.export.save`, which drops the metadata of the graph, at a node, too."""
    program.graph_module.meta[_META] = what
    node = next(_calls(program), None)
    if node is not None:
        plain = asdict(replace(what, fired=dict(what.fired)))  # asdict takes a Counter for something else
        node.meta["custom"] = {**(node.meta.get("custom") or {}), _META: plain}


def record_of(program: ExportedProgram) -> QuantizeRecord:
    """What `quantize` noted on `program`; an empty record for a program that was made elsewhere."""
    found = program.graph_module.meta.get(_META)
    if isinstance(found, QuantizeRecord):
        return found
    saved = next((c[_META] for n in _calls(program) if _META in (c := n.meta.get("custom") or {})), None)
    return _read(saved) if saved is not None else QuantizeRecord()


def _calls(program: ExportedProgram) -> Iterator[Node]:
    return (node for node in program.graph.nodes if node.op == "call_function")


def _read(saved: Mapping[str, Any]) -> QuantizeRecord:
    """The record of its `asdict`, which JSON has been through."""
    declined = [Decline(**{**d, "nodes": tuple(d["nodes"])}) for d in saved["declined"]]
    headroom = [Headroom(**h) for h in saved["headroom"]]
    return QuantizeRecord(**{**saved, "declined": declined, "headroom": headroom})
