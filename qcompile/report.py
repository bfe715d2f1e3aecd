"""The report of an export: what was quantized, what was left and why, and which checks the file passed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from passes.base import Decline
from passes.graph import aten, calls, is_call, module_path
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE
from passes.quantize.sites import NORMS, linear_name
from passes.sdpa import SDPA
from qcompile.onnx.compare import Comparison
from qcompile.onnx.verify import Check


@dataclass
class Report:
    """What an export did.

    Attributes:
        target, opset, recipe: what was asked for.
        ops: ONNX operator type -> count, most frequent first.
        quantized: module path -> format, for linear layers, attentions and norms with a quantized output.
        unquantized: module path -> what it is, for linear layers and attentions that stayed in floating point.
        declined: places that a pass looked at and left, with the reason.
        fired: pass -> number of rewrites.
        notices: rules of the recipe that had no effect on this model.
        checks: the verifier's verdicts.
        comparison: layer by layer against the program, if a batch was given.
        bytes: size on disk, external data included.
    """

    target: str
    opset: int
    recipe: str
    ops: dict[str, int]
    quantized: dict[str, str]
    unquantized: dict[str, str]
    declined: list[Decline]
    fired: dict[str, int]
    notices: list[str]
    checks: list[Check]
    bytes: int
    comparison: Comparison | None = None
    kind: str = field(default="export", init=False)

    def to_json(self) -> str:
        """The report as JSON text; `qcompile inspect` reads it back."""
        data: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "comparison"
        }
        data["declined"] = [dataclasses.asdict(decline) for decline in self.declined]
        data["checks"] = [dataclasses.asdict(check) for check in self.checks]
        data["comparison"] = self.comparison.to_json() if self.comparison is not None else None
        return json.dumps(data, indent=2)


def quantized_modules(gm: GraphModule) -> tuple[dict[str, str], dict[str, str]]:
    """(path -> format of what is quantized, path -> kind of what is not) in a quantized program, by module path."""
    quantized: dict[str, str] = {}
    left: dict[str, str] = {}
    for node in calls(gm.graph, aten.linear.default, SDPA, ATTENTION, *NORMS):
        if node.target is ATTENTION:
            quantized[module_path(node)] = str(node.kwargs["format"])
        elif node.target is SDPA:
            left[module_path(node)] = "attention"
        elif node.target is aten.linear.default:
            fmt = _linear_format(node)
            (quantized if fmt else left)[linear_name(node)] = fmt or "linear"
        elif (fmt := _output_format(node)) is not None:
            quantized[module_path(node)] = fmt
    return quantized, left


def _linear_format(node: Node) -> str | None:
    """`fp8` with a quantized weight and input, `fp8_weight_only` with the weight alone, None without."""
    weight, x = node.args[1], node.args[0]
    if not is_call(weight, DEQUANTIZE):
        return None
    assert isinstance(weight, Node)
    fmt = str(weight.kwargs["format"])
    return fmt if is_call(x, DEQUANTIZE) else f"{fmt}_weight_only"


def _output_format(node: Node) -> str | None:
    """Format that every consumer of a norm's output reads it in, or None."""
    quantizes = [user for user in node.users if user.target is QUANTIZE]
    return str(quantizes[0].kwargs["format"]) if quantizes and len(quantizes) == len(node.users) else None
