"""Quantize/dequantize pairs where a recipe wants them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.formats import Format
from passes.graph import Emitter, following, is_call, shape
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.pairs import constant_pair, measured_pair, name_quantizer
from passes.quantize.sites import Site


@dataclass(frozen=True)
class Quantizer:
    """What to do at a site.

    Attributes:
        format: of the codes.
        scale: the constant one; None where scales are measured at run time. For a format of two levels the global
            scale: those of the blocks are measured on the tensor, which for a weight `FoldWeights` does.
    """

    format: Format
    scale: torch.Tensor | None


class InsertQdq(Pass):
    """Put quantize/dequantize on the operands that were chosen.

    Before:
        y = linear(x, w)
    After:
        y = linear(dequantize(quantize(x, sx), sx), dequantize(quantize(w, sw), sw))
    After, in a format of two levels (NVFP4; of the weight the same):
        c, b = dynamic_quantize(x, g)
        y = linear(dequantize(c, dequantize(b, g)), ...)

    Requires: the sites of `find_sites` on this graph. A `softmax` site is left to `FuseAttentionQdq`.
    Ensures: consumers of one tensor that agree on format and scale share one pair, those whose scales differ in shape
        or in any value have pairs of their own; an edge that was not chosen keeps the float values, bit for bit.
    Declines when: the operand is quantized in that format already, by an output quantizer before it; or the last axis
        is no multiple of the format's block.
    Why: a pair on the edge, not on the producer, is what lets a residual stay exact.
    """

    def __init__(self, quantizers: Mapping[Site, Quantizer]) -> None:
        super().__init__()
        self.quantizers = quantizers

    def rewrite(self, gm: GraphModule) -> None:
        pairs: dict[tuple[Node, str], list[tuple[torch.Tensor | None, Node]]] = defaultdict(list)
        # outputs first, then in the order of the graph, so that a shared pair stands before all its readers
        chosen = [item for item in self.quantizers.items() if item[0].consumer.graph is gm.graph]
        ordered = sorted(chosen, key=lambda item: (item[0].operand != "output", item[0].consumer))
        for site, quantizer in ordered:
            if site.operand == "softmax":
                continue
            source = site.tensor
            if reason := misfit(source, quantizer.format):  # and `PadReduction` has not filled it up
                self.decline(reason, site.consumer)
                continue
            if is_call(source, DEQUANTIZE) and source.kwargs["format"] == quantizer.format.name:
                self.decline("this tensor is quantized already, by the output quantizer before it", source)
                continue
            if site.operand == "output" and any(_is_quantize(user) for user in source.users):
                self.decline("this output is quantized already", source)
                continue
            known = pairs[source, quantizer.format.name]
            pair = next((pair for scale, pair in known if _same(scale, quantizer.scale)), None)
            if pair is None:
                pair = self._insert(gm, site, source, quantizer)
                known.append((quantizer.scale, pair))
                self.fire()
            if site.operand == "output":
                source.replace_all_uses_with(pair, delete_user_cb=lambda user: not _is_quantize(user))
            else:
                assert site.index is not None
                site.consumer.update_arg(site.index, pair)  # not every argument that is the same tensor

    def _insert(self, gm: GraphModule, site: Site, source: Node, quantizer: Quantizer) -> Node:
        anchor = site.consumer if source.op == "get_attr" or site.operand == "weight" else following(source)
        emit = Emitter(anchor, like=site.consumer)
        if quantizer.scale is None:
            pair = measured_pair(source, quantizer.format, emit)
        else:
            name = f"{site.module}.{site.operand}_scale".lstrip(".")
            pair = constant_pair(gm, source, quantizer.scale, quantizer.format, name, emit)
        name_quantizer(pair, site.name)
        return pair


def _same(scale: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether quantizers with these scales make the same codes; None is measured on the tensor that both read."""
    if scale is None or other is None:
        return scale is other
    return torch.equal(scale.float(), other.float())  # in the type that the graph keeps them in


def misfit(source: Node, fmt: Format) -> str | None:
    """Why `source` cannot be quantized to `fmt`, or None."""
    if not fmt.packed:  # the last block of others can be smaller
        return None
    block, size = fmt.sizes[-1], shape(source)[-1]
    if isinstance(size, int) and size % block == 0:
        return None
    return f"{fmt.name} has blocks of {block} elements, and the reduction axis has {size}"


def _is_quantize(node: Node) -> bool:
    return is_call(node, QUANTIZE, DYNAMIC_QUANTIZE)
