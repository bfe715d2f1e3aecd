"""What `quantize` notes on a program for the reports of the back ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.export import ExportedProgram

from passes.base import Decline
from qcompile.headroom import Headroom

UNREACHED = "Calibration"  # what declined a layer that calibration gave no range, instead of the name of a pass
FIXED = "Sites"  # what declined a layer that no input reaches
_META = "qcompile"  # key of the record in program.graph_module.meta


@dataclass
class QuantizeRecord:
    """What `quantize` did, kept with the program for reports (in memory; a saved program does not carry it).

    Attributes:
        recipe: name of the recipe.
        fired: pass -> number of rewrites.
        declined: what passes left as it was, and why.
        notices: rules of the recipe that had no effect, or that say why they are there; and what the user should know
            of the calibration data and of numbers that the compute dtype holds badly.
        headroom: how near each tensor that calibration saw came to the end of the compute dtype, the nearest first.
    """

    recipe: str = ""
    fired: Mapping[str, int] = field(default_factory=dict)
    declined: list[Decline] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    headroom: list[Headroom] = field(default_factory=list)


def record(program: ExportedProgram, what: QuantizeRecord) -> None:
    """Keep `what` with `program`."""
    program.graph_module.meta[_META] = what


def record_of(program: ExportedProgram) -> QuantizeRecord:
    """What `quantize` noted on `program`; an empty record for a program that was loaded or made elsewhere."""
    found = program.graph_module.meta.get(_META)
    return found if isinstance(found, QuantizeRecord) else QuantizeRecord()
