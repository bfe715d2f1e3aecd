"""Which layers and attentions of a program are quantized, and what has a weight and stayed in floating point."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.base import Decline
from passes.constants import LAYOUT, constant
from passes.dependence import fixed_nodes
from passes.graph import aten, calls, is_call, module_path
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.normalize.attention import NormalizeAttention
from passes.normalize.routing import is_grouped
from passes.operators import NORMS, OPERATORS, counted_kinds, of_kind, operator_of, refusals
from passes.place.low_rank import is_low_rank
from passes.place.rotate import FACTOR
from passes.quantize.sites import linear_name, weight_name
from passes.reading import Operand, QuantizedLayer
from passes.sdpa import SDPA
from passes.state import cache_kind, stored_format
from passes.subgraphs import graphs, inner, is_worked_on, operator_name, subgraph_calls
from qcompile.report.convolutions import ConvolutionEstimate, estimates
from qcompile.report.low_rank import KIND, WHY, LowRankCost, low_rank_costs

KINDS = counted_kinds()
_LAYERS = [target for target, row in OPERATORS.items() if "weight" in row.operands]
_PRODUCTS = set(of_kind("product"))
_RECURRENT = set(of_kind("recurrent"))
_GATHERS = (aten.index.Tensor, aten.index_select.default, aten.embedding.default, aten.gather.default)


@dataclass(frozen=True)
class Modules:
    """What of a graph is quantized, as reports have it: `quantized_modules`, their `coverage`, the `reasons`, and what
    a roofline says of its convolutions, and what its low-rank parts take."""

    quantized: dict[str, str]
    unquantized: dict[str, str]
    coverage: dict[str, tuple[int, int]]
    reasons: dict[str, str]
    convolutions: list[ConvolutionEstimate]
    low_rank: list[LowRankCost]

    @classmethod
    def of(cls, gm: GraphModule, declined: Iterable[Decline] = ()) -> Modules:
        declined = list(declined)
        quantized, unquantized = quantized_modules(gm, declined)
        reasons = _reasons(gm, unquantized, declined)
        counts, costs = coverage(gm, unquantized), list(low_rank_costs(gm))
        return cls(quantized, unquantized, counts, reasons, list(estimates(gm)), costs)


def _reasons(gm: GraphModule, unquantized: Mapping[str, str], declined: Iterable[Decline]) -> dict[str, str]:
    """Path -> why it stayed in floating point; what the recipe leaves out has none."""
    known, told = refusals() | {KIND: WHY}, {decline.module: decline.reason for decline in declined}
    loose = {name for part in graphs(gm) for _, name in _loose_weights(part)}
    found = {path: known["product"] if path in loose else known.get(kind, "") for path, kind in unquantized.items()}
    return {path: why for path in found if (why := found[path] or told.get(path, ""))}


def quantized_modules(gm: GraphModule, declined: Iterable[Decline] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """(path -> format of what is quantized, path -> kind of what is not) in a quantized program, by module path.

    Args:
        declined: what passes left, among it attentions that are written in a way that no site could be found for.
    """
    found = list(_modules(gm))
    quantized = {path: fmt for _, path, fmt in found if fmt is not None}
    # a table that is the weight of a linear layer, too, is that layer's
    left = {path: kind for kind, path, fmt in sorted(found, key=lambda one: one[0] in KINDS) if fmt is None}
    for decline in declined:
        if decline.pass_name == NormalizeAttention.__name__:
            left.setdefault(decline.module, "attention")
    return quantized, left


def coverage(gm: GraphModule, unquantized: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Kind -> (how many are quantized, how many there are), for the kinds that the program has.

    Args:
        unquantized: path -> kind of what is not, which may hold attentions that no pass found in `gm`.
    """
    quantized = {(kind, path) for kind, path, fmt in _modules(gm) if fmt is not None}
    counts = {kind: sum(k == kind for k, _ in quantized) for kind in KINDS}
    left = {kind: sum(k == kind for k in unquantized.values()) for kind in KINDS}
    return {kind: (counts[kind], counts[kind] + left[kind]) for kind in KINDS if counts[kind] + left[kind]}


def layers(gm: GraphModule) -> dict[tuple[str, str], bool]:
    """(kind, path) of each layer that `coverage` counts -> whether it is quantized."""
    found: dict[tuple[str, str], bool] = {}
    for kind, path, fmt in _modules(gm):
        if kind in KINDS:
            found[kind, path] = fmt is not None or found.get((kind, path), False)
    return found


def _modules(gm: GraphModule) -> Iterator[tuple[str, str, str | None]]:
    """(kind, path, format or None) of each layer with a weight, each attention, and each quantized norm or skip
    branch."""
    for part in graphs(gm):
        yield from _modules_of(part)


def _modules_of(gm: GraphModule) -> Iterator[tuple[str, str, str | None]]:
    for node in calls(gm.graph, *_LAYERS, SDPA, ATTENTION, *NORMS):
        if node.target is ATTENTION:
            yield "attention", module_path(node), str(node.kwargs["format"])
        elif node.target is SDPA:
            yield "attention", module_path(node), None
        elif node.target in NORMS:
            if (fmt := _output_format(node)) is not None:
                yield "norm", module_path(node), fmt
        elif (row := operator_of(node)) is not None and not row.refusal:
            yield KIND if is_low_rank(node) else row.kind, linear_name(node), _linear_format(node)
    for node in calls(gm.graph, *of_kind("cache")):
        if (cache := cache_kind(node)) is not None:
            yield "cache", f"{module_path(node)}.{cache}_cache".lstrip("."), stored_format(node)
    for node in calls(gm.graph, *of_kind("residual")):
        row = operator_of(node)
        index = None if row is None else row.operands.get("residual")
        if index is not None and (skip := Operand.read(node.args[index])) is not None:
            yield "residual", module_path(node), skip.format.name
    for node in calls(gm.graph, *OPERATORS):
        row = None if node.target in _PRODUCTS else operator_of(node)
        if row is not None and row.refusal and (name := _refused(gm, node)) is not None:
            yield row.kind, name, None
    for kind, name in (*_loose_weights(gm), *_unseen_layers(gm)):
        yield kind, name, None


def _refused(gm: GraphModule, node: Node) -> str | None:
    """What reports call a layer whose weight nothing quantizes; None where that is no parameter.

    The name of the weight, which tells functional calls apart, less those of recurrent layers, which have many, and
    those that other layers read, too.
    """
    if node.target in _RECURRENT:
        return module_path(node)
    inputs = [n.args[0] if is_call(n, DEQUANTIZE) else n for n in node.all_input_nodes]  # codes of other tools
    weights = [
        n for n in inputs if isinstance(n, Node) and isinstance(t := constant(gm, n), torch.nn.Parameter) and t.ndim > 1
    ]
    if not weights:
        return None
    tied = sum(len(n.users) for n in gm.graph.find_nodes(op="get_attr") if n.target == weights[0].target) > 1
    return (module_path(node) if tied else "") or weight_name(str(weights[0].target)) or module_path(node)


def _unseen_layers(gm: GraphModule) -> Iterator[tuple[str, str]]:
    """(kind, name) of the layers in graphs that no pass works on, which are called as the module that holds them."""
    for call in subgraph_calls(gm.graph):
        if operator_name(call) == "flex_attention":
            yield "attention", module_path(call)
        for part in () if is_worked_on(call) else inner(gm, call):
            for node in calls(part.graph, *_LAYERS, SDPA):
                yield OPERATORS[node.target].kind, module_path(call)


def _linear_format(node: Node) -> str | None:
    """`fp8` with a quantized weight and input, `fp8_weight_only` with the weight alone, None without."""
    layer = QuantizedLayer.read(node)
    if layer is None:
        return None
    return layer.weight.format.name if layer.input is not None else f"{layer.weight.format.name}_weight_only"


def _output_format(node: Node) -> str | None:
    """Format that every consumer of a norm's output reads it in, or None."""
    quantizes = [user for user in node.users if is_call(user, QUANTIZE, DYNAMIC_QUANTIZE)]
    return str(quantizes[0].kwargs["format"]) if quantizes and len(quantizes) == len(node.users) else None


def _loose_weights(gm: GraphModule) -> list[tuple[str, str]]:
    """(kind, name) of floating-point weights that are multiplied in a form that has no quantizers.

    A weight with two axes counts if it is a parameter: tables of angles and the like are not.
    """
    found: dict[str, str] = {}
    fixed = fixed_nodes(gm)
    tables = {node.args[0].target for node in calls(gm.graph, aten.embedding.default) if isinstance(node.args[0], Node)}
    for node in gm.graph.find_nodes(op="get_attr"):
        if node.target in tables:
            continue
        tensor = constant(gm, node)
        if tensor is None or tensor.ndim < 2 or not tensor.is_floating_point() or tensor.itemsize == 1:
            continue
        is_weight = isinstance(tensor, torch.nn.Parameter) if tensor.ndim == 2 else tensor.shape[0] > 1
        is_weight = is_weight and not str(node.target).startswith(FACTOR)
        if is_weight and _is_multiplied(node, fixed):
            found[str(node.target)] = "linear" if tensor.ndim == 2 else "experts"
    return [(kind, name) for name, kind in found.items()]


def _is_multiplied(weight: Node, fixed: Collection[Node]) -> bool:
    """Whether a product takes `weight`, rearranged or gathered, by an operator that is no linear layer.

    Args:
        fixed: what is the same at every call: a weight that is computed of others.
    """
    for user in weight.users:
        if is_call(user, *_PRODUCTS) or is_grouped(user):
            return True
        source = user.args[0] if is_call(user, *LAYOUT, *_GATHERS) else None
        if (user in fixed or weight in (source, *_listed(source))) and _is_multiplied(user, fixed):
            return True
    return False


def _listed(argument: object) -> tuple[object, ...]:
    return tuple(argument) if isinstance(argument, (list, tuple)) else ()
