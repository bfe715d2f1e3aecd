"""Linear layers that read the same tensor become one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.blocks import scale_rows
from passes.constants import add_constant, constant, constant_before, equal_bits
from passes.formats import FP8_1X128, FP8_128X128
from passes.graph import Emitter, aten, is_call, only_user, shape, val
from passes.groups import parallel, parent_of, reads
from passes.ir import DEQUANTIZE
from passes.place.low_rank import SplitProduct
from passes.quantize.sites import linear_name
from passes.reading import QuantizedLayer


class MergeParallelLinears(Pass):
    """Join quantized linear layers with one input: Q, K and V; gate and up.

    Before:
        q = transpose(reshape(linear(x, wq), [B,S,Hq,D]), 1, 2); k = ...; v = ...
        g = linear(x, wg); u = linear(x, wu)
    After:
        y = transpose(reshape(linear(x, cat(wq, wk, wv)), [B,S,Hq+Hk+Hv,D]), 1, 2)
        q, k, v = split(y, [Hq,Hk,Hv], dim=1)
        g, u = split(linear(x, cat(wg, wu)), [N,N], dim=-1)
        of layers with low-rank parts: y = add(linear(x, cat(wq, wk, wv)), linear(h, cat(bq, bk, bv)))

    Requires: weights as codes.
    Ensures: every output element is the same sum of products. Where a layer's blocks of 128 x 128 would not start at a
        multiple of 128 rows, each row gets the scales of its blocks, format fp8_1x128. Where each weight has one scale,
        and not the same (other tools calibrate layers alone), rows have scales of their own, and those of two levels
        share the first global scale, with the ratio of the others multiplied to the result.
    Declines when: the weights' formats differ, only some outputs are split into heads and the widths differ, or their
        low-rank parts do not share the first factor.
    Why: two to four kernels fewer for each transformer block. The heads have to be apart before the split: of the forms
        tried with the TensorRT-RTX builder, a split of the last axis makes it take the GEMM apart again, one of a
        [B,S,3,H,D] tensor loses FP8 in the QKV GEMM where attention is not quantized, and this one was never worse.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for source in list(gm.graph.nodes):
            if not is_call(source, DEQUANTIZE):
                continue
            linears = [linear for user in source.users if (linear := _Linear.read(user, source)) is not None]
            linears.sort(key=lambda linear: (parent_of(linear.name), linear.node))  # nodes sort as in the graph
            for group in parallel(linears, lambda linear: reads(linear.node)):
                self._consider(gm, group)

    def _consider(self, gm: GraphModule, group: list[_Linear]) -> None:
        if len(group) < 2:
            return
        views = [only_user(linear.result) for linear in group]
        to_heads = all(_splits_into_heads(view, views[0]) for view in views)
        reason = None
        if len({(linear.weight.kwargs["format"], val(linear.scale).ndim) for linear in group}) > 1:
            reason = "their weights are quantized to different formats or granularities"
        elif not to_heads and len({linear.width for linear in group}) > 1:
            reason = "these linear layers differ in width and are not all split into heads"
        elif not all(_reduced_alike(gm, group[0], linear) for linear in group[1:]):
            reason = "their low-rank parts do not share the first factor"
        if reason is not None:
            self.decline(reason, *(linear.node for linear in group))
            return
        merged = _merge(gm, group)
        if to_heads:
            _split_heads(merged, [view for view in views if view is not None])
        else:
            _split(merged, [linear.result for linear in group], [linear.width for linear in group], -1)
        self.fire()


@dataclass(frozen=True)
class _Linear:
    """A linear layer whose input and weight are dequantized: `linear(x, dequantize(codes, scale), bias)`.

    `scale` is the global one where the weight has two levels: `dequantize(codes, dequantize(block_scales, scale))`.
    `bias` is that of the low-rank part where there is one.
    """

    node: Node
    weight: Node
    codes: Node
    block_scales: Node | None
    scale: Node
    bias: Node | None
    low_rank: SplitProduct | None

    @classmethod
    def read(cls, node: Node, source: Node) -> _Linear | None:
        """`node` as a quantized linear layer of `source` with constant codes, scale and bias; None if it is not."""
        layer = QuantizedLayer.read(node) if is_call(node, aten.linear.default) and node.args[0] is source else None
        if layer is None:
            return None
        low_rank = SplitProduct.read(node) if layer.bias is None else None
        bias = layer.bias if low_rank is None else low_rank.bias
        if any(part.op != "get_attr" for part in (*layer.weight.parts, bias) if part is not None):
            return None
        weight = layer.weight
        scale = weight.global_scale or weight.scale
        return cls(node, weight.node, weight.codes, weight.block_scales, scale, bias, low_rank)

    @property
    def name(self) -> str:
        return linear_name(self.node)

    @property
    def result(self) -> Node:
        """What readers of the layer read: with the low-rank part."""
        return self.node if self.low_rank is None else self.low_rank.total

    @property
    def width(self) -> int:
        return int(shape(self.node)[-1])


def _reduced_alike(gm: GraphModule, one: _Linear, other: _Linear) -> bool:
    """Whether both have a low-rank part with one first factor, in checkpoints a copy each; or neither has one."""
    if one.low_rank is None or other.low_rank is None:
        return one.low_rank is other.low_rank
    first, second = one.low_rank, other.low_rank
    if first.reduced is second.reduced:
        return True
    factors = constant(gm, first.down), constant(gm, second.down)
    same_input = first.reduced.args[0] is second.reduced.args[0]
    return same_input and factors[0] is not None and factors[1] is not None and equal_bits(factors[0], factors[1])


def _scales_differ(gm: GraphModule, group: list[_Linear]) -> bool:
    """Whether each weight has one scale, and not all the same."""
    return len({float(constant(gm, linear.scale)) for linear in group if val(linear.scale).ndim == 0}) > 1  # type: ignore[arg-type]


def _merge(gm: GraphModule, group: list[_Linear]) -> Node:
    """One linear layer with the rows of all weights, placed at the first of them."""
    first = group[0]
    emit = Emitter(first.node)
    codes = _rows(emit, [linear.codes for linear in group])
    scale, options = constant_before(first.scale, first.node), dict(first.weight.kwargs)
    if first.weight.kwargs["format"] == FP8_128X128.name and any(linear.width % 128 for linear in group[:-1]):
        rows = torch.cat([scale_rows(gm, linear.weight) for linear in group])
        scale, options["format"] = add_constant(gm, str(first.scale.target), rows, first.node), FP8_1X128.name
    elif val(scale).ndim:
        scale = _rows(emit, [linear.scale for linear in group])
    elif _scales_differ(gm, group) and first.block_scales is None:
        scale = add_constant(gm, str(first.scale.target), _row_scales(gm, group), first.node)
    blocks = [linear.block_scales for linear in group if linear.block_scales is not None]
    if blocks:
        chain = first.weight.args[1]
        assert isinstance(chain, Node)
        scale = emit(DEQUANTIZE, _rows(emit, blocks), scale, **chain.kwargs)
    weight = Emitter(first.node, like=first.weight)(DEQUANTIZE, codes, scale, **options)
    bias = emit(aten.cat.default, [_bias(gm, linear, first.node) for linear in group]) if _any_bias(group) else None
    ratio = _row_scales(gm, group).flatten() if blocks and _scales_differ(gm, group) else None
    before = [] if bias is None or ratio is not None or first.low_rank is not None else [bias]
    merged = emit(aten.linear.default, first.node.args[0], weight, *before)
    for node in (merged, weight, codes):
        node.meta["nn_module_stack"] = _joint_stack(group)
    if ratio is not None:
        ratio = (ratio / ratio[0]).to(val(merged).dtype)
        merged = emit(aten.mul.Tensor, merged, add_constant(gm, f"{first.name}.output_ratio", ratio, first.node))
    if first.low_rank is not None:
        return emit(aten.add.Tensor, merged, _merge_low_rank(emit, group, first.low_rank, bias))
    return merged if bias is None or ratio is None else emit(aten.add.Tensor, merged, bias)


def _merge_low_rank(emit: Emitter, group: list[_Linear], first: SplitProduct, bias: Node | None) -> Node:
    """The low-rank parts of all layers as one product, with their biases."""
    ups = _rows(emit, [linear.low_rank.up for linear in group if linear.low_rank is not None])
    # in a model that a checkpoint was read into, the first factor is multiplied behind the first layer
    reduced = Emitter(emit.before, like=first.reduced)(
        aten.linear.default, first.reduced.args[0], constant_before(first.down, emit.before)
    )
    product = emit(aten.linear.default, reduced, ups, *([] if bias is None else [bias]))
    for node in (product, ups):
        node.meta["nn_module_stack"] = _joint_stack(group)
    return product


def _row_scales(gm: GraphModule, group: list[_Linear]) -> torch.Tensor:
    """The scale of each weight for each of its rows, `[N, 1]`."""
    scales = [constant(gm, linear.scale) for linear in group]
    return torch.cat([s.expand(linear.width, 1) for s, linear in zip(scales, group, strict=True) if s is not None])


def _rows(emit: Emitter, constants: list[Node]) -> Node:
    """The rows of all `constants`, one after the other."""
    return emit(aten.cat.default, [constant_before(constant, emit.before) for constant in constants])


def _any_bias(group: list[_Linear]) -> bool:
    return any(linear.bias is not None for linear in group)


def _bias(gm: GraphModule, linear: _Linear, before: Node) -> Node:
    """The bias of `linear`, zeros if it has none (Whisper's k_proj)."""
    if linear.bias is not None:
        return constant_before(linear.bias, before)
    return add_constant(gm, f"{linear.name}.bias", torch.zeros(linear.width, dtype=val(linear.node).dtype), before)


def _joint_stack(group: list[_Linear]) -> dict[str, tuple[str, str]]:
    """The module stack around the first layer, with a last entry that names all: `attention.q_proj+k_proj+v_proj`."""
    path = "+".join([group[0].name, *(linear.name.rpartition(".")[2] for linear in group[1:])])
    stack = dict(list(group[0].node.meta.get("nn_module_stack", {}).items())[:-1])
    return {**stack, path: (path, "torch.nn.modules.linear.Linear")}


def _split_heads(merged: Node, views: list[Node]) -> None:
    """View the merged result as heads and give each old view, or the transpose behind it, its share of them."""
    emit = Emitter(merged.next, like=merged)
    counts = [int(shape(view)[2]) for view in views]
    batch, length, _ = emit.sizes(merged)
    joined = emit(aten.reshape.default, merged, [batch, length, sum(counts), shape(views[0])[3]])
    transposes = [transpose for view in views if _swaps_heads(transpose := only_user(view)) and transpose is not None]
    if len(transposes) == len(views):
        _split(emit(aten.transpose.int, joined, 1, 2), transposes, counts, 1)
    else:
        _split(joined, views, counts, 2)


def _swaps_heads(node: Node | None) -> bool:
    """Whether `node` is `transpose(x, 1, 2)` of a [B,S,H,D] tensor."""
    return node is not None and is_call(node, aten.transpose.int) and {int(a) % 4 for a in node.args[1:]} == {1, 2}  # type: ignore[arg-type]


def _split(joined: Node, olds: list[Node], sizes: list[int], axis: int) -> None:
    """Give the users of each old node its part of `joined`."""
    emit = Emitter(joined.next, like=joined)
    parts = emit(aten.split_with_sizes.default, joined, sizes, axis)
    for index, old in enumerate(olds):
        old.replace_all_uses_with(emit.getitem(parts, index))


def _splits_into_heads(view: Node | None, like: Node | None) -> bool:
    """Whether `view` splits the last axis of its input into heads of the same width as `like`: [B,S,H,D]."""
    if (
        view is None
        or like is None
        or not is_call(view, aten.reshape.default)
        or not is_call(like, aten.reshape.default)
    ):
        return False
    before, after = shape(view.all_input_nodes[0]), shape(view)
    return len(before) == 3 and len(after) == 4 and after[:2] == before[:2] and after[3] == shape(like)[-1]
