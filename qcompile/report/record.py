"""What `quantize` notes on a program for the reports of the back ends."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from torch.export import ExportedProgram
from torch.fx import Node

from passes.base import Decline
from passes.graph import is_call
from passes.ir import DEQUANTIZE
from qcompile.messages import first_line
from qcompile.report.headroom import Headroom
from qcompile.report.ranges import RangeGrowth
from qcompile.report.validated import reason

UNREACHED = "Calibration"  # what declined a layer that calibration gave no range, instead of the name of a pass
SITES = "Sites"  # what declined a layer that no input reaches, or that gains nothing
VERSION = 1  # of the record in a file; the one without a number, of the first releases, has these but `ranges`
_META = "qcompile"  # key of the record in the metadata of the graph, and of nodes
_LOST = "recipe, what was declined and what calibration saw are not known"
_NAME = re.compile(r"[^\W\d]\w{0,99}")


def _symbol_names(names: Mapping[str, str]) -> Mapping[str, str]:
    """Files have these names, and formulas of them: `torch.export.Dim` takes no others."""
    if strange := [name for pair in names.items() for name in pair if not _NAME.fullmatch(name)]:
        raise ValueError(f"{strange[0][:80]!r} is no name of a dimension")
    return names


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
        ranges: how the ranges of activations grew over the samples; None where there is nothing to compare.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    recipe: str = ""
    fired: Mapping[str, int] = field(default_factory=dict)
    declined: list[Decline] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    headroom: list[Headroom] = field(default_factory=list)
    calibration: str = ""
    dimensions: Annotated[Mapping[str, str], AfterValidator(_symbol_names)] = field(default_factory=dict)
    ranges: RangeGrowth | None = None


def record(program: ExportedProgram, what: QuantizeRecord) -> None:
    """Keep `what` with `program`, also for `torch.export.save`, which drops the metadata of the graph."""
    program.graph_module.meta[_META] = what
    plain = {"version": VERSION, **asdict(replace(what, fired=dict(what.fired)))}  # asdict takes no Counter
    keepers = set(_keepers(program))
    for node in program.graph.nodes:
        custom = {key: value for key, value in _custom(node).items() if key != _META}
        if node in keepers:
            custom[_META] = plain
        if custom or node.meta.get("custom"):
            node.meta["custom"] = custom


def record_of(program: ExportedProgram) -> QuantizeRecord:
    """What `quantize` noted on `program`; an empty record for a program that was made elsewhere.

    A record that cannot be read, in a file of a newer qcompile or a damaged one, is one of a single notice: the graph
    is what counts, and it was read.
    """
    found = program.graph_module.meta.get(_META)
    if isinstance(found, QuantizeRecord):
        return found
    saved = [custom[_META] for node in program.graph.nodes if _META in (custom := _custom(node))]
    problem = ""
    for data in saved:
        try:
            return _read(data)
        except ValueError as error:
            problem = str(error)
    return QuantizeRecord(notices=[problem]) if problem else QuantizeRecord()


def _keepers(program: ExportedProgram) -> Iterator[Node]:
    """Three nodes of which one remains if the casts at inputs and outputs go, or what nothing depends on, or Q/DQ do.

    Nodes other than calls are saved without metadata, and so is the choice of one of several results.
    """
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    results = [_call_of(node) for node in program.graph.output_node().all_input_nodes]
    last = [node for node in results if node.op == "call_function"]
    quantized = [node for node in calls if is_call(node, DEQUANTIZE)]
    for found in (calls, last, quantized):
        yield from found[:1]


def _call_of(node: Node) -> Node:
    while node.target is operator.getitem and isinstance(source := node.args[0], Node):
        node = source
    return node


def _custom(node: Node) -> dict[str, Any]:
    custom = node.meta.get("custom")
    return custom if isinstance(custom, dict) else {}


def _read(saved: Any) -> QuantizeRecord:
    """The record in data that JSON has been through, and that anybody may have made. ValueError says what is wrong."""
    version = saved.get("version", VERSION) if isinstance(saved, dict) else VERSION
    if type(version) is int and version > VERSION:
        raise ValueError(f"this program was quantized by a newer qcompile, whose notes are not read here: {_LOST}")
    try:
        if version != VERSION or not isinstance(saved, dict):
            raise ValueError("it has no version that is known")
        fields = {key: value for key, value in saved.items() if key != "version"}
        return _RECORD.validate_json(json.dumps(fields))
    except (ValueError, TypeError, RecursionError) as error:
        told = reason(error) if isinstance(error, ValidationError) else first_line(error)
        raise ValueError(f"what qcompile noted on this program is damaged ({told}): {_LOST}") from error


_RECORD = TypeAdapter(QuantizeRecord)
