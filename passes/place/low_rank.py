"""A weight becomes a low-rank part in half and a rest that is quantized."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.constants import (
    add_constant,
    constant_before,
    evaluate_constant,
    is_constant_expression,
    replace_with_constant,
    root_constants,
)
from passes.graph import Emitter, aten, dtype, is_call, only_user
from passes.quantize.sites import linear_name

DOWN, UP = "svdquant_lora_a", "svdquant_lora_b"
"""The last parts of the factors' names, as Model Optimizer's checkpoints have them."""

_MULTIPLE = 8  # that the reduction axis of a product in half is padded to
_FACTOR = re.compile(rf"({DOWN}|{UP})(_\d+)?$")


@dataclass(frozen=True, eq=False)
class LowRank:
    """What the weights of some linear layers that read one tensor have in common.

    Attributes:
        down: `[R, K]`, of all of them. ups: `[N, R]`, one of each. Both in the dtype that the program will compute in.
    """

    down: torch.Tensor
    ups: tuple[torch.Tensor, ...]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + sum(up.nbytes for up in self.ups)


class SplitLowRank(Pass):
    """Take the low-rank parts that were found out of the weights of linear layers.

    Before:
        q = linear(x, wq, bq); k = linear(x, wk, bk)
    After:
        h = linear(x, svdquant_lora_a)                          # [..., R], in the dtype of the model
        q = add(linear(x, wq - svdquant_lora_b_q @ svdquant_lora_a), linear(h, svdquant_lora_b_q, bq))
        k = add(linear(x, wk - svdquant_lora_b_k @ svdquant_lora_a), linear(h, svdquant_lora_b_k, bk))

    Requires: weights as constant expressions; nothing is quantized yet, so that calibration sees what is left.
    Ensures: the same product, within rounding, as what is left is taken from the factors as they are stored. The linear
        layer is the same node, and what was read of it is read of the sum. Layers that read one tensor share the first
        product, layers that share weights share all factors. Other readers of a weight, a tied embedding for one, keep
        it.
    Declines when: whoever chose the parts left a layer, and says why. A layer that has a part already is not looked at.
    Why: what the largest singular values make of a weight is its outliers; without them blocks round to finer steps,
        and that part of the product sees an input that was not rounded. The bias goes with the product in half, behind
        which TensorRT-RTX adds it and the quantized product in one kernel; behind the other it took a kernel more.
    """

    def __init__(self, parts: Mapping[tuple[Node, ...], LowRank], left: Mapping[Node, str] | None = None) -> None:
        """
        Args:
            parts: calls of `aten.linear` with one input -> what to take out of their weights, in their order. Calls of
                layers that share weights have the same object.
            left: calls that get none -> why.
        """
        super().__init__()
        self.parts, self.left = parts, left or {}

    def rewrite(self, gm: GraphModule) -> None:
        for node, reason in self.left.items():
            if node.graph is gm.graph:
                self.decline(reason, node)
        calls: dict[LowRank, list[tuple[Node, ...]]] = defaultdict(list)
        for nodes, part in self.parts.items():
            if nodes[0].graph is gm.graph and not any(map(SplitProduct.read, nodes)):
                calls[part].append(nodes)
        for part, groups in calls.items():
            self._split(gm, part, groups)
        if calls:
            self._tell(calls)
        elif not self.parts and any(node.graph is gm.graph for node in self.left):
            self.notice("no linear layer gets a low-rank part: " + "; ".join(dict.fromkeys(self.left.values())))

    def _tell(self, parts: Collection[LowRank]) -> None:
        """What they cost, for the reports."""
        ranks, layers = sorted({part.rank for part in parts}), sum(len(part.ups) for part in parts)
        most = f" to {ranks[-1]}" if ranks[1:] else ""
        told = (
            f"{layers} weights have a low-rank part that is not quantized, of rank {ranks[0]}{most}:"
            f" {sum(part.nbytes for part in parts):,} bytes, and two products more for each of the {len(parts)} groups"
            " of layers that read one tensor"
        )
        if any(rank % _MULTIPLE for rank in ranks):
            told += f"; ranks that are no multiple of {_MULTIPLE} are padded to it by back ends"
        self.notice(told)

    def _split(self, gm: GraphModule, part: LowRank, groups: Sequence[tuple[Node, ...]]) -> None:
        """Take `part` out of the layers of `groups`, all of which read the same weights."""
        first = min(min(nodes) for nodes in groups)
        names = [linear_name(node) for node in groups[0]]
        down = _stored(gm, f"{_joint(names)}.{DOWN}", part.down, first)
        ups = [_stored(gm, f"{name}.{UP}", up, first) for name, up in zip(names, part.ups, strict=True)]
        for nodes in groups:
            start = Emitter(min(nodes))
            reduced = start(aten.linear.default, nodes[0].args[0], constant_before(down, start.before))
            for node, up in zip(nodes, ups, strict=True):
                _add_product(node, reduced, up)
                self.fire()
        for readers, factor in zip(zip(*groups, strict=True), part.ups, strict=True):
            _take(gm, sorted(readers), factor.float() @ part.down.float())


def is_low_rank(node: Node) -> bool:
    """Whether `node` multiplies by a factor of a low-rank part."""
    return is_call(node, aten.linear.default) and is_factor(node.args[1])


@dataclass(frozen=True)
class SplitProduct:
    """What stands around a linear layer whose weight has a low-rank part: `total = add(layer, linear(h, up, bias))`."""

    total: Node
    product: Node

    @classmethod
    def read(cls, layer: Node) -> SplitProduct | None:
        """What is around the linear layer `layer`; None if it has no low-rank part."""
        total = only_user(layer)
        if total is None or not is_call(total, aten.add.Tensor) or total.args[0] is not layer:
            return None
        product = total.args[1]
        if not isinstance(product, Node) or not is_low_rank(product) or not is_low_rank(_argument(product, 0)):
            return None
        return cls(total, product)

    @property
    def up(self) -> Node:
        return _argument(self.product, 1)

    @property
    def reduced(self) -> Node:
        """`linear(x, down)`."""
        return _argument(self.product, 0)

    @property
    def down(self) -> Node:
        return _argument(self.reduced, 1)

    @property
    def bias(self) -> Node | None:
        found = self.product.args[2] if len(self.product.args) > 2 else None
        return found if isinstance(found, Node) else None


def _argument(node: Node, index: int) -> Node:
    found = node.args[index]
    assert isinstance(found, Node)
    return found


def is_factor(node: object) -> bool:
    """Whether `node` is a factor, also of several layers that became one."""
    if not isinstance(node, Node) or not is_constant_expression(node):
        return False
    return all(_FACTOR.search(str(root.target)) for root in root_constants(node))


def _stored(gm: GraphModule, name: str, factor: torch.Tensor, before: Node) -> Node:
    """The factor in the dtype of the graph, which holds it exactly."""
    own = factor.to(dtype(before)).contiguous()
    return add_constant(gm, name, torch.nn.Parameter(own, requires_grad=False), before)


def _joint(names: list[str]) -> str:
    """`attention.q_proj`, `attention.k_proj` -> `attention.q_proj+k_proj`."""
    return "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])


def _add_product(node: Node, reduced: Node, up: Node) -> None:
    """Add the rest of the way through the low-rank part, and the bias, to the result of `node`."""
    emit = Emitter(node.next, like=node)
    product = emit(aten.linear.default, reduced, constant_before(up, emit.before), *node.args[2:])
    node.args = node.args[:2]
    total = emit(aten.add.Tensor, node, product)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


def _take(gm: GraphModule, readers: list[Node], part: torch.Tensor) -> None:
    """Give the linear layers `readers`, which have one weight, that weight less `part`, under its name."""
    weight = readers[0].args[1]
    assert isinstance(weight, Node)
    own = Emitter(readers[0])(aten.alias.default, weight)
    for reader in readers:
        reader.update_arg(1, own)
    rest = evaluate_constant(gm, weight).float() - part
    replace_with_constant(gm, own, rest.to(dtype(weight)))
