"""Products that names do not show: of a layer, or an attention, that reads the quantized result of another."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from passes.constants import LAYOUT
from passes.graph import is_call
from passes.operators import operator_of, quantizable
from passes.quantize.sites import Site
from passes.subgraphs import all_calls
from qcompile.errors import RecipeError
from qcompile.recipe import QuantizerConfig
from qcompile.schemes.config import attention_mismatch, mismatch

Named = tuple[str, QuantizerConfig]


def check_edges(gm: GraphModule, configs: Mapping[Site, QuantizerConfig]) -> None:
    """Raise `RecipeError` for operands that no target multiplies, where one is a result that is quantized.

    It is not quantized by itself, but made, and perhaps rearranged, by what has an output quantizer. Those that are
    quantized by themselves the recipe compares by their names.
    """
    own = {(site.consumer, site.operand): config for site, config in configs.items()}
    outputs = {site.consumer: (site.name, config) for site, config in configs.items() if site.operand == "output"}
    results = {name for name, _ in outputs.values()}
    for call in all_calls(gm, *quantizable()):
        row = operator_of(call)
        places = row.operands.items() if row is not None else ()
        found = {operand: _named(call, operand, index, own, outputs) for operand, index in places}
        for left, right in (("input", "weight"), ("q", "k"), ("softmax", "v")):
            first, second = found.get(left), found.get(right)
            if first is not None and second is not None and (told := _told(left, first, second)):
                read = " and ".join(dict.fromkeys(name for name, _ in (first, second) if name in results))
                raise RecipeError(f"what reads {read}: {told}" if read else told)


def _told(left: str, first: Named, second: Named) -> str | None:
    """Why nothing multiplies two operands. Attention in half precision takes any of its own that are one family."""
    if left == "input":
        return mismatch(second[1], first[1])
    return None if first[1].format == second[1].format else attention_mismatch(first, second)


def _named(
    call: Node,
    operand: str,
    index: int | None,
    own: Mapping[tuple[Node, str], QuantizerConfig],
    outputs: Mapping[Node, Named],
) -> Named | None:
    """What quantizes an operand of `call`, and what messages call it: its own quantizer, or that of what made it."""
    if (call, operand) in own:
        return operand, own[call, operand]
    source = call.args[index] if index is not None and operand != "weight" else None
    while isinstance(source, Node) and source not in outputs and is_call(source, *LAYOUT):
        source = source.args[0]
    return outputs.get(source) if isinstance(source, Node) else None
