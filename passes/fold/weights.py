"""Quantized weights are stored as codes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
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
from passes.ir import ATTENTION, DYNAMIC_QUANTIZE, QUANTIZE, dynamic_quantize, quantize
from passes.pairs import measured_by
from passes.sdpa import SDPA


class FoldWeights(Pass):
    """Evaluate the quantize of a constant, and keep the codes.

    Before:
        w8 = quantize(view(w), scale)
        y = linear(x, dequantize(w8, scale))
        c, b = dynamic_quantize(v, g)           # two levels: NVFP4
        z = linear(x, dequantize(c, dequantize(b, g)))
        c, s = dynamic_quantize(u, None)        # blocks of 128 x 128
        t = linear(x, dequantize(c, s))
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

    def rewrite(self, gm: GraphModule) -> None:
        self.groups, self.rooms = _parallel(gm), {}
        for node in calls(gm.graph, QUANTIZE, DYNAMIC_QUANTIZE):
            weight, scale = node.args
            if not isinstance(weight, Node) or not is_constant_expression(weight) or _is_attended(node):
                continue
            if node.target is DYNAMIC_QUANTIZE:
                self._fold_blocks(gm, node)
            elif constant(gm, scale) is not None:
                self._fold(gm, node)
            else:
                continue
            self.fire()

    def _fold(self, gm: GraphModule, node: Node) -> None:
        """A scale for the tensor or for each channel, which is known."""
        format, weight, scale = str(node.kwargs["format"]), node.args[0], constant(gm, node.args[1])
        assert isinstance(weight, Node) and scale is not None
        constant_rows = ConstantRows(gm, weight)
        codes = torch.empty(constant_rows.shape, dtype=get_format(format).storage, device=constant_rows.device)
        for rows, values in constant_rows:
            own = scale[rows] if scale.ndim and scale.shape[0] > 1 else scale
            codes[rows] = quantize(values, own, format=format)
        node.update_arg(1, None)  # so that the weight alone names the codes
        replace_with_constant(gm, node, codes)

    def _room(self, node: Node, index: int, device: torch.device) -> torch.Tensor:
        """Memory for one of the results of `node`, next to that of the layers that it will be merged with."""
        value = node.meta["val"][index]
        group = self.groups.get(node, [node]) if device.type == "cpu" else [node]  # elsewhere torch could not save it
        if (group[0], index) not in self.rooms:
            rows = sum(int(member.meta["val"][index].shape[0]) for member in group)
            self.rooms[group[0], index] = torch.empty((rows, *value.shape[1:]), dtype=value.dtype, device=device)
        start = sum(int(member.meta["val"][index].shape[0]) for member in group[: group.index(node)])
        return self.rooms[group[0], index][start : start + int(value.shape[0])]

    def _fold_blocks(self, gm: GraphModule, node: Node) -> None:
        """A scale for each block, measured here; of two levels, under a global one."""
        fmt, weight = get_format(str(node.kwargs["format"])), node.args[0]
        assert isinstance(weight, Node)
        global_scale = constant(gm, node.args[1])
        rows_of_block = fmt.sizes[0] if len(fmt.sizes) == len(val(weight).shape) else 1
        constant_rows = ConstantRows(gm, weight, rows_of_block)
        codes, scales = (self._room(node, index, constant_rows.device) for index in (0, 1))
        for rows, values in constant_rows:
            blocks = slice(rows.start // rows_of_block, -(-rows.stop // rows_of_block))
            codes[rows], scales[blocks] = dynamic_quantize(values, global_scale, format=fmt.name)
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


def _is_attended(quantize: Node) -> bool:
    return any(is_call(reader, ATTENTION, SDPA) for pair in quantize.users for reader in pair.users)


def _parallel(gm: GraphModule) -> dict[Node, list[Node]]:
    """Quantize of a weight with blocks -> those of all layers of its module that read the same tensor, in order."""
    readers: dict[Node, Node] = {}  # the first linear layer of each
    for linear in calls(gm.graph, aten.linear.default):
        if (quantize := measured_by(linear.args[1])) is not None:
            readers.setdefault(quantize, linear)
    groups = parallel(readers, lambda q: reads(readers[q], q.kwargs["format"], q.meta["val"][0].shape[1:]))
    return {node: group for group in groups for node in group}
