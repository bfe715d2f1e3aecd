"""Quantize/dequantize pairs where a recipe wants them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import equal_bits
from passes.errors import PassError
from passes.formats import Format
from passes.graph import Emitter, following, is_call, shape
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.pairs import chosen_pair, constant_pair, measured_pair, name_quantizer, store_codes
from passes.quantize.sites import Site
from passes.state import cache_kind

_RESULTS = ("output", "k_cache", "v_cache")  # operands that are what the consumer makes


@dataclass(frozen=True)
class Quantizer:
    """What to do at a site.

    Attributes:
        format: of the codes.
        scale: the constant one; None where scales are measured at run time. For a format of two levels the global
            scale: those of the blocks are measured on the tensor, which for a weight `FoldWeights` does.
        block_scales: of a weight in a format with blocks, the scales of these where an algorithm chose them: codes of
            `format.scale` under `scale`, or plain float32 numbers.
        codes: of a weight, where an algorithm chose them; None for the nearest. With the scale in the dtype that
            `RoundScales` gives it they are what the weight will be.
        amax: the largest magnitude that `scale` is for, where somebody keeps it.
    """

    format: Format
    scale: torch.Tensor | None
    block_scales: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    amax: torch.Tensor | None = None

    def to(self, device: torch.device) -> Quantizer:
        """With its tensors on `device`."""
        tensors = (self.scale, self.block_scales, self.codes, self.amax)
        return Quantizer(self.format, *(None if tensor is None else tensor.to(device) for tensor in tensors))

    def same(self, other: Quantizer) -> bool:
        """Whether both make the same codes of one tensor; a scale of None is measured on that."""
        pairs = [(self.block_scales, other.block_scales), (self.codes, other.codes)]
        if any(a is not b and (a is None or b is None or not equal_bits(a, b)) for a, b in pairs):
            return False
        if self.scale is None or other.scale is None:
            return self.scale is other.scale
        return torch.equal(self.scale.float(), other.scale.float())  # in the type that the graph keeps them in


class InsertQdq(Pass):
    """Put quantize/dequantize on the operands that were chosen.

    Before:
        y = linear(x, w)
    After:
        y = linear(dequantize(quantize(x, sx), sx), dequantize(quantize(w, sw), sw))
    After, in a format of two levels (NVFP4; of the weight the same):
        c, b = dynamic_quantize(x, g)
        y = linear(dequantize(c, dequantize(b, g)), ...)
    After, for a weight whose block scales `b`, or whose codes, were chosen:
        y = linear(x, dequantize(quantize(w, dequantize(b, g)), dequantize(b, g)))
        y = linear(x, dequantize(w_codes, sw))

    Requires: the sites of `find_sites` on this graph. A `softmax` site is left to `FuseAttentionQdq`.
    Ensures: consumers of one tensor that agree on format and scale share one pair, those whose scales differ in shape
        or in any value have pairs of their own; an edge that was not chosen keeps the float values, bit for bit. Codes
        that were chosen have the name of the weight, as `FoldWeights` gives it to those that it makes.
    Declines when: the operand is quantized in that format already, by an output quantizer before it; or the last axis
        is no multiple of the format's block.
    Why: a pair on the edge, not on the producer, is what lets a residual stay exact.
    """

    def __init__(self, quantizers: Mapping[Site, Quantizer]) -> None:
        super().__init__()
        self.quantizers = quantizers

    def rewrite(self, gm: GraphModule) -> None:
        pairs: dict[tuple[Node, str], list[tuple[Quantizer, Node]]] = defaultdict(list)
        codes: dict[Node, torch.Tensor] = {}
        # outputs first, then in the order of the graph, so that a shared pair stands before all its readers
        chosen = [item for item in self.quantizers.items() if item[0].consumer.graph is gm.graph]
        ordered = sorted(chosen, key=lambda item: (item[0].operand not in _RESULTS, item[0].consumer))
        for site, quantizer in ordered:
            if site.operand == "softmax":
                continue
            source = site.tensor
            if reason := misfit(source, quantizer.format):  # and `PadReduction` has not filled it up
                self.decline(reason, site.consumer)
                continue
            if site.operand in ("k", "v") and _is_cached(source, quantizer):
                continue
            if is_call(source, DEQUANTIZE) and source.kwargs["format"] == quantizer.format.name:
                self.decline("this tensor is quantized already, by the output quantizer before it", source)
                continue
            if site.operand in _RESULTS and any(_is_quantize(user) for user in source.users):
                self.decline("this output is quantized already", source)
                continue
            known = pairs[source, quantizer.format.name]
            pair = next((pair for other, pair in known if quantizer.same(other)), None)
            if pair is None:
                pair = self._insert(gm, site, source, quantizer)
                known.append((quantizer, pair))
                if quantizer.codes is not None:
                    codes[pair] = quantizer.codes
                self.fire()
            if site.operand in _RESULTS:
                source.replace_all_uses_with(pair, delete_user_cb=lambda user: not _is_quantize(user))
            else:
                assert site.index is not None
                site.consumer.update_arg(site.index, pair)  # not every argument that is the same tensor
        for pair, tensor in codes.items():  # when all readers of a weight are known: its name goes to the last
            quantize = pair.args[0]
            assert isinstance(quantize, Node)
            store_codes(gm, quantize, tensor)

    def _insert(self, gm: GraphModule, site: Site, source: Node, quantizer: Quantizer) -> Node:
        anchor = site.consumer if source.op == "get_attr" or site.operand == "weight" else following(source)
        emit = Emitter(anchor, like=site.consumer)
        fmt, name = quantizer.format, f"{site.module}.{site.operand}_scale".lstrip(".")
        check_chosen(quantizer, site.name, site.operand, shape(site.tensor))
        if quantizer.block_scales is not None:
            pair = chosen_pair(gm, source, quantizer.scale, quantizer.block_scales, fmt, name, emit)
        elif quantizer.scale is None:
            pair = measured_pair(source, fmt, emit)
        else:
            pair = constant_pair(gm, source, quantizer.scale, fmt, name, emit)
        name_quantizer(pair, site.name)
        return pair


def check_chosen(quantizer: Quantizer, name: str, operand: str, sizes: Sequence[Any]) -> None:
    """Raises PassError where codes or block scales that an algorithm chose do not fit a tensor of `sizes`."""
    fmt, known = quantizer.format, {"codes": quantizer.codes, "block scales": quantizer.block_scales}
    if operand != "weight" and (chosen := [what for what, tensor in known.items() if tensor is not None]):
        raise PassError(f"{name}: {chosen[0]} are for weights, whose numbers are known")
    if quantizer.codes is not None:
        wanted = [*sizes[:-1], sizes[-1] // 2 if fmt.packed else sizes[-1]]
        _check_tensor(name, "codes", quantizer.codes, fmt.storage, wanted)
        if fmt.sizes and quantizer.block_scales is None:
            raise PassError(f"{name}: codes of {fmt.name} come with the scales of their blocks")
    if quantizer.block_scales is not None:
        if not fmt.sizes:
            raise PassError(f"{name}: {fmt.name} has no blocks, so no scales of them")
        stored = fmt.scale.storage if fmt.scale else torch.float32
        blocks = [*sizes[: -len(fmt.sizes)], *fmt.blocks(sizes)]
        _check_tensor(name, "block scales", quantizer.block_scales, stored, blocks)


def _check_tensor(name: str, what: str, tensor: torch.Tensor, dtype: torch.dtype, sizes: Sequence[Any]) -> None:
    if (tensor.dtype, list(tensor.shape)) != (dtype, list(sizes)):
        raise PassError(f"{name}: its {what} are {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(sizes)}")


def misfit(source: Node, fmt: Format) -> str | None:
    """Why `source` cannot be quantized to `fmt`, or None."""
    if not fmt.whole_blocks:
        return None
    block, size = fmt.sizes[-1], shape(source)[-1]
    if isinstance(size, int) and size % block == 0:
        return None
    return f"{fmt.name} has blocks of {block} elements, and the reduction axis has {size}"


def _is_cached(source: Node, quantizer: Quantizer) -> bool:
    """Whether keys or values are those of a cache that is quantized as `quantizer` says."""
    codes = source.args[0] if is_call(source, DEQUANTIZE) else None
    made = isinstance(codes, Node) and is_call(codes, QUANTIZE) and cache_kind(codes.args[0]) is not None  # type: ignore[arg-type]
    return made and source.kwargs["format"] == quantizer.format.name


def _is_quantize(node: Node) -> bool:
    return is_call(node, QUANTIZE, DYNAMIC_QUANTIZE)
