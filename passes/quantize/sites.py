"""Where quantizers can sit: every operand that a recipe can name, of the operators in `passes.operators`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from passes.constants import is_constant_expression, root_constants
from passes.graph import is_call, module_class, module_path
from passes.ir import DEQUANTIZE
from passes.operators import SUFFIXES, Operator, operator_of, quantizable
from passes.subgraphs import all_calls

# Products over fewer elements than this are no GEMM in TensorRT: it multiplies and adds in the kernel beside them, in
# half. Quantized they would be two kernels more (TensorRT-RTX 1.7.1, SM89), for a weight of no size.
LEAST_REDUCTION = 5


@dataclass(frozen=True)
class Site:
    """One quantizer that a recipe can switch on.

    Attributes:
        module: path of the module that owns it.
        operand: one of those that `passes.operators` has for the consumer: `weight` of a linear layer, `q` of an
            attention.
        module_class: qualified class name of that module.
        consumer: the call whose operand (or result) is quantized.
    """

    module: str
    operand: str
    module_class: str | None
    consumer: Node

    @property
    def name(self) -> str:
        """The quantizer's full name, which the globs of a recipe match."""
        return f"{self.module}.{self.suffix}" if self.module else self.suffix

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.operand]

    @property
    def index(self) -> int | None:
        """Which argument of the consumer the operand is; None for a result or something inside of it."""
        return self.operator.operands[self.operand]

    @property
    def operator(self) -> Operator:
        """The row of the consumer."""
        row = operator_of(self.consumer)
        assert row is not None, f"{self.consumer} is in no table"
        return row

    @property
    def idle(self) -> str | None:
        """Why quantizing this operand saves nothing, or None."""
        if self.operand not in ("input", "weight") or not self.operator.gemm:
            return None
        return idle_reduction(self.operator.reduction(self.consumer))

    @property
    def tensor(self) -> Node:
        """The node whose values the quantizer sees."""
        if self.index is None:
            return self.consumer
        operand = self.consumer.args[self.index]
        assert isinstance(operand, Node)
        return operand


def idle_reduction(size: object) -> str | None:
    """Why a linear layer whose reduction axis has `size` elements gains nothing by quantizers; None if it may."""
    if isinstance(size, int) and size < LEAST_REDUCTION:
        return f"it has {size} input features, and products over fewer than {LEAST_REDUCTION} are no GEMM"
    return None


def find_sites(gm: GraphModule) -> list[Site]:
    """Every place of a normalized graph that could be quantized, in the order of the graph, then of those in it."""
    sites = []
    for node in all_calls(gm, *quantizable()):
        row = operator_of(node)
        if row is None or row.refusal:
            continue
        weight = row.weight(node)
        if weight is None:
            name = module_path(node)
        elif is_constant_expression(weight):
            name = linear_name(node)
        else:
            continue
        sites += [Site(name, operand, module_class(node), node) for operand in row.operands]
    return sites


def linear_name(node: Node) -> str:
    """Path of a linear layer: its weight's name without `.weight`, which also names `F.linear` calls apart."""
    weight = node.args[1].args[0] if is_call(node.args[1], DEQUANTIZE) else node.args[1]  # type: ignore[union-attr]
    assert isinstance(weight, Node)
    if not is_constant_expression(weight):
        return module_path(node)
    roots = root_constants(weight)
    if len(roots) != 1:
        return module_path(node)
    return weight_name(str(roots[0].target)) or module_path(node)


def weight_name(name: str) -> str:
    """The path of the layer whose weight is called `name`, perhaps with a number if another layer kept the name."""
    return re.sub(r"[._]?weight(_\d+)?$", "", name)
