"""Quantized weights are stored as codes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.codes import rows_together, write_codes
from passes.constants import (
    ConstantRows,
    add_constant,
    constant,
    is_constant_expression,
    replace_with_constant,
    root_constants,
)
from passes.formats import get_format
from passes.graph import aten, calls, is_call, val
from passes.groups import parallel, reads
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.pairs import measured_by, store_codes
from passes.reading import Operand
from passes.sdpa import SDPA

_PIECE = 1 << 17  # elements: their fp32 numbers come and go among the codes that stay, and leave holes there


class FoldWeights(Pass):
    """Evaluate the quantize of a constant, and keep the codes.

    Before:
        w8 = quantize(view(w), scale)
        y = linear(x, dequantize(w8, scale))
        c, b = dynamic_quantize(v, g)           # two levels: NVFP4
        z = linear(x, dequantize(c, dequantize(b, g)))
        c, s = dynamic_quantize(u, None)        # blocks of 128 x 128
        t = linear(x, dequantize(c, s))
        y = linear(x, dequantize(quantize(w, dequantize(b, g)), dequantize(b, g)))      # b was chosen
    After:
        y = linear(x, dequantize(w_codes, scale))
        z = linear(x, dequantize(v_codes, dequantize(v_block_scales, g)))
        t = linear(x, dequantize(u_codes, u_scales))

    Requires: scales in their final dtype, as codes are made with exactly the scale that multiplies them later.
    Ensures: codes equal `round(w / scale)` in fp32 with saturation; the float weight is gone if nothing else reads it,
        and the codes take its name.
    Declines when: an attention reads it, without a note: learned queries are no weights, and `FoldFixed` stores them
        once they are laid out.
    Why: the dequantize stays, so that back ends see a quantized weight and no float copy of it. Blocks of parallel
        layers (q, k, v; gate, up) lie side by side in memory, so that a back end that merges them copies nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[Node, list[Node]] = {}
        self.rooms: dict[tuple[Node, int], torch.Tensor] = {}
        self.results: dict[Node, tuple[torch.Tensor, torch.Tensor]] = {}

    def rewrite(self, gm: GraphModule) -> None:
        self.groups, self.rooms = _parallel(gm), {}
        self.results = {node: _results(node) for node in self.groups}  # of the first nothing is left when the last is
        for node in calls(gm.graph, QUANTIZE, DYNAMIC_QUANTIZE):
            weight = node.args[0]
            if not isinstance(weight, Node) or not is_constant_expression(weight) or _is_attended(node):
                continue
            if node.target is DYNAMIC_QUANTIZE:
                self._fold_blocks(gm, node)
            elif all(constant(gm, scale) is not None for scale in _levels(node)):
                self._fold(gm, node)
            else:
                continue
            self.fire()

    def _fold(self, gm: GraphModule, node: Node) -> None:
        """Scales for the tensor, for each channel or for each block, which are known."""
        fmt, weight, scale = get_format(str(node.kwargs["format"])), node.args[0], constant(gm, _levels(node)[0])
        assert isinstance(weight, Node)
        rows = ConstantRows(gm, weight, rows_together(fmt, len(val(weight).shape)) if fmt.sizes else 1, _PIECE)
        if fmt.sizes:
            stored = constant(gm, _levels(node)[-1])
            assert stored is not None
            codes, block_scales = (self._room(node, index, rows.device) for index in (0, 1))
            block_scales.copy_(stored)
            stored.data = block_scales
            write_codes(rows, fmt, codes, scale if fmt.scale else None, block_scales, chosen=True)
        else:
            codes = torch.empty(rows.shape, dtype=fmt.storage, device=rows.device)
            write_codes(rows, fmt, codes, scale)
        store_codes(gm, node, codes)

    def _room(self, node: Node, index: int, device: torch.device) -> torch.Tensor:
        """Memory for the codes (0) or block scales (1) of `node`, next to that of the layers that it will be merged
        with."""
        value = (self.results.get(node) or _results(node))[index]
        group = self.groups.get(node, [node]) if device.type == "cpu" else [node]  # elsewhere torch could not save it
        sizes = [int(self.results[member][index].shape[0]) for member in group] if group[1:] else [int(value.shape[0])]
        if (group[0], index) not in self.rooms:
            self.rooms[group[0], index] = torch.empty((sum(sizes), *value.shape[1:]), dtype=value.dtype, device=device)
        start = sum(sizes[: group.index(node)])
        return self.rooms[group[0], index][start : start + int(value.shape[0])]

    def _fold_blocks(self, gm: GraphModule, node: Node) -> None:
        """A scale for each block, measured here; of two levels, under a global one."""
        fmt, weight = get_format(str(node.kwargs["format"])), node.args[0]
        assert isinstance(weight, Node)
        global_scale = constant(gm, node.args[1])
        rows = ConstantRows(gm, weight, rows_together(fmt, len(val(weight).shape)), _PIECE)
        codes, scales = (self._room(node, index, rows.device) for index in (0, 1))
        write_codes(rows, fmt, codes, global_scale, scales)
        if global_scale is not None:
            name = str(node.args[1].target).replace("global_scale", "block_scale")  # type: ignore[union-attr]
        else:
            name = f"{root_constants(weight)[0].target}_scale"
        node.update_arg(1, None)
        for part in list(node.users):
            is_codes = part.args[1] == 0
            stored = node if is_codes else add_constant(gm, name, torch.nn.Parameter(scales, requires_grad=False), part)
            part.replace_all_uses_with(stored)
            gm.graph.erase_node(part)
        replace_with_constant(gm, node, codes)


def _levels(quantize: Node) -> list[object]:
    """The nodes of the scales of a `quantize`: one, or the global one and that of the blocks under it."""
    scale = quantize.args[1]
    return [scale.args[1], scale.args[0]] if isinstance(scale, Node) and is_call(scale, DEQUANTIZE) else [scale]


def _results(quantize: Node) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, block scales), fake ones, of a weight in a format that has blocks."""
    if quantize.target is DYNAMIC_QUANTIZE:
        codes, scales = quantize.meta["val"]
        return codes, scales
    stored = _levels(quantize)[-1]
    assert isinstance(stored, Node)
    return val(quantize), val(stored)


def _is_attended(quantize: Node) -> bool:
    return any(is_call(reader, ATTENTION, SDPA) for pair in quantize.users for reader in pair.users)


def _parallel(gm: GraphModule) -> dict[Node, list[Node]]:
    """Quantize of a weight with blocks -> those of all layers of its module that read the same tensor, in order."""
    readers: dict[Node, Node] = {}  # the first linear layer of each
    for linear in calls(gm.graph, aten.linear.default):
        if (quantize := measured_by(linear.args[1]) or _chosen_blocks(linear.args[1])) is not None:
            readers.setdefault(quantize, linear)
    groups = parallel(readers, lambda q: reads(readers[q], q.kwargs["format"], _results(q)[0].shape[1:]))
    return {node: group for group in groups for node in group}


def _chosen_blocks(pair: object) -> Node | None:
    """The quantize whose codes `pair` dequantizes, if an algorithm chose the scales of its blocks."""
    quantized = Operand.read(pair)
    if quantized is None or not is_call(quantized.codes, QUANTIZE) or not quantized.format.sizes:
        return None
    return quantized.codes
