"""A graph captured in one floating-point type computes in another."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.base import Pass
from passes.constants import is_constant_expression, root_constants
from passes.errors import PassError
from passes.graph import Emitter, aten, calls, fake_again, following, is_call, place_of, val
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.legalize.choices import choices
from passes.legalize.half_kernels import lacks_half_kernel
from passes.legalize.islands import global_scales, of_their_own, without_half_kernel
from passes.legalize.positions import is_periodic, positions
from passes.legalize.ranges import beyond, largest, least, may_mask
from passes.messages import some
from passes.subgraphs import graphs, held, is_scan, subgraph_calls
from passes.traits import operator_name

# Position of the scale among the arguments: `RoundScales` gives it its dtype, with a check.
_SCALE = {QUANTIZE: 1, DEQUANTIZE: 1, DYNAMIC_QUANTIZE: 1, ATTENTION: 4}


class ConvertComputeDtype(Pass):
    """Compute in half precision what the model computes on its data; keep positions and masks as they are.

    Before (float32):
        angle = mul(_to_copy(arange(s), float32), inv_freq)     # from sizes and buffers only
        y = mul(linear(x, w), cos(angle))                       # from an input and a parameter
        z = mul(y, sin(mul(timestep, 1000)))                    # an angle from an input
    After (float16):
        angle = mul(_to_copy(arange(s), float32), inv_freq)
        y = mul(linear(_to_copy(x), _to_copy(w)), _to_copy(cos(angle)))
        z = mul(y, _to_copy(sin(mul(timestep, 1000))))

    Requires: `NormalizeRmsNorm` ran, so that no sum of squares is left to overflow; `RemoveNoOps` did, so that no
        assertion of a dtype is left to fail; the source dtype is the model's.
    Ensures: of a float32 model on its way to float16 the parts in bfloat16 compute in float16, too.
        Inputs and outputs of the program keep their dtype, and so do global scales that are measured at run time.
        A float value that depends on no floating-point input and no parameter stays as it was up to where it meets one;
        so do sines, cosines and what leads to them or to a cast to integers (`passes.legalize.positions`), the scores
        of routers (`passes.legalize.choices`), complex numbers and what has no kernel in half precision, which a notice
        names, if the target has fewer digits than the source. A graph in a call (`passes.subgraphs`) takes and
        gives the source dtype, as a program does; that of a scan computes in it, too: TensorRT-RTX 1.7.1 builds none
        with a cast and a quantized layer in it. What is quantized is cast before its codes are made, a weight not at
        all, so that its codes come from the original numbers. Casts of constants are left to `FoldConstants`.
    Declines when: never; raises `PassError` naming a constant that holds a number beyond the target dtype.
    Why: half precision holds integers up to 2048 only, so a position counted in it is wrong, and the sine of a
        timestep of 981 is off by 0.2 in it; and a Cast between Q/DQ and the GEMM would be one more thing for a back
        end to look through.
    """

    def __init__(self, source: torch.dtype, target: torch.dtype) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.converted: set[Node] = set()
        self.computed: set[Node] = set()
        self.parameters: set[Node] = set()
        self.kept: set[GraphModule] = set()

    def rewrite(self, gm: GraphModule) -> None:
        if gm in self.kept:
            return
        scans = (call for call in subgraph_calls(gm.graph) if is_scan(call))
        self.kept.update(part for call in scans for body in held(gm, call).values() for part in graphs(body))
        if (self.source, self.target) == (
            torch.float32,
            torch.float16,
        ):
            part = ConvertComputeDtype(torch.bfloat16, self.target)
            part.log = self.log
            part.rewrite(gm)
        self.converted.clear()
        self.gm = gm
        names = dict(gm.named_parameters(remove_duplicate=False))  # a tied weight has a name for each use
        parameters = {node for node in gm.graph.nodes if node.op == "get_attr" and str(node.target) in names}
        self.parameters = parameters
        inputs = {node for node in gm.graph.nodes if node.op == "placeholder" and self._is_source(node)}
        exact: set[Node] = set()
        if torch.finfo(self.target).eps > torch.finfo(self.source).eps:
            exact = positions(gm.graph, _dependents(gm, parameters), self.source) | choices(gm.graph)
            exact |= self._without_kernel(gm, _dependents(gm, inputs | parameters))
            exact |= of_their_own(gm, exact)
        exact |= global_scales(gm, self.source) | set(subgraph_calls(gm.graph))
        quantized = set(calls(gm.graph, QUANTIZE, DYNAMIC_QUANTIZE))
        data = _dependents(gm, inputs | parameters | quantized, {node for node in exact if is_periodic(node)})
        reached = _dependents(gm, inputs | parameters)
        self.computed = {node for node in gm.graph.nodes if node.op == "call_function" and node not in reached}
        casts: dict[Node, Node] = {}
        for node in list(gm.graph.nodes):
            if node.op == "output":
                self._restore_outputs(node)
            elif node in exact:
                self._widen(node, casts)
            elif node.op == "call_function" and node in data:
                self._convert(node, casts)

    def _without_kernel(self, gm: GraphModule, data: set[Node]) -> set[Node]:
        """What half precision has no kernel for; a notice names those that are computed from data."""
        found = without_half_kernel(gm)
        lacking = [node for node in gm.graph.nodes if node in found & data and lacks_half_kernel(node)]
        if lacking:
            named = list(dict.fromkeys(f"{place_of(node)} ({operator_name(node)})" for node in lacking))
            self.notice(f"in {self.source}, as torch has no kernel of it in half precision: {some(named)}")
        return found

    def _is_source(self, node: Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.dtype == self.source

    def _is_of_source(self, node: Node) -> bool:
        """Whether `node` reads or makes a number of the source dtype, or of what was one."""
        made = pytree.tree_leaves(node.meta.get("val"))
        if any(isinstance(value, torch.Tensor) and value.dtype == self.source for value in made):
            return True
        return any(self._is_source(operand) or operand in self.converted for operand in node.all_input_nodes)

    def _convert(self, node: Node, casts: dict[Node, Node]) -> None:
        is_weight = is_call(node, QUANTIZE, DYNAMIC_QUANTIZE) and is_constant_expression(node.args[0])
        if is_weight or is_constant_expression(node) or _is_block_scale(node) or self._is_boundary(node):
            return
        if not self._is_of_source(node):
            return
        scale = node.args[_SCALE[node.target]] if node.target in _SCALE else None
        for operand in node.all_input_nodes:
            if self._is_source(operand) and operand is not scale:
                node.replace_input_with(operand, self._cast(operand, node, casts))
                self.fire()
        node.args, node.kwargs = pytree.tree_map(self._argument, (node.args, node.kwargs))
        value = fake_again(node)
        if self._is_source(node) and value.dtype == self.target:
            self.converted.add(node)
            self.fire()
        node.meta["val"] = value

    def _widen(self, node: Node, casts: dict[Node, Node]) -> None:
        """Let a position that is computed from converted data have that in the source dtype again."""
        for operand in node.all_input_nodes:
            if operand in self.converted:
                if operand not in casts:
                    casts[operand] = Emitter(operand.next, like=node)(aten._to_copy.default, operand, dtype=self.source)
                node.replace_input_with(operand, casts[operand])
                self.fire()

    def _is_boundary(self, node: Node) -> bool:
        """Whether `node` is a cast like those of this pass: into the target dtype, or out of it for an output."""
        if is_call(node, aten.clamp.default):  # of a mask, before its cast
            return all(is_call(u, aten._to_copy.default) and u.kwargs.get("dtype") is self.target for u in node.users)
        if not is_call(node, aten._to_copy.default):
            return False
        if node.kwargs.get("dtype") is self.target:
            return True
        returned = all(user.op == "output" for user in node.users)
        return returned and self._is_source(node) and val(node.all_input_nodes[0]).dtype is self.target

    def _argument(self, value: Any) -> Any:
        """`value` of a call in the target dtype: the source dtype is replaced, a number out of range saturates.

        `masked_fill(scores, mask, -3.4e38)` would otherwise be an error in float16, and an infinity in ONNX.
        """
        if value is self.source:
            return self.target
        if isinstance(value, float) and math.isfinite(value):
            limit = torch.finfo(self.target).max
            return min(max(value, -limit), limit)
        return value

    def _cast(self, operand: Node, user: Node, casts: dict[Node, Node]) -> Node:
        """`operand` in the target dtype, made once, right behind it."""
        if operand not in casts:
            emit = Emitter(following(operand), like=operand if operand.op == "call_function" else user)
            value = operand
            limits, constant = torch.finfo(self.target), is_constant_expression(operand)
            is_computed = operand in self.computed or (constant and self.parameters.isdisjoint(root_constants(operand)))
            masks = any(may_mask(operand, other, is_computed) for other in operand.users)
            low = least(self.gm, operand) if masks else None
            if masks and (low is None or low < limits.min / 2):
                # an additive mask made for float32 would become -inf, and a fully masked row NaN; half of the lowest
                # number is still finite with a score added to it
                value = emit(aten.clamp.default, operand, limits.min / 2, limits.max)
            elif constant and (found := largest(self.gm, operand)) > limits.max:
                names = ", ".join(str(root.target) for root in root_constants(operand))
                raise PassError(f"{names} holds numbers up to {found:.3g}, and {beyond(self.target)}")
            casts[operand] = emit(aten._to_copy.default, value, dtype=self.target)
        return casts[operand]

    def _restore_outputs(self, output: Node) -> None:
        emit = Emitter(output)
        for result in output.all_input_nodes:
            if result in self.converted:
                output.replace_input_with(result, emit(aten._to_copy.default, result, dtype=self.source))


def _is_block_scale(node: Node) -> bool:
    """Whether `node` makes the scales of blocks for another dequantize: a half could not hold them."""
    return is_call(node, DEQUANTIZE) and any(is_call(u, DEQUANTIZE) and u.args[1] is node for u in node.users)


def _dependents(gm: GraphModule, roots: set[Node], but: Collection[Node] = ()) -> set[Node]:
    """`roots` and what is computed from their values, not counting what goes through the nodes of `but`."""
    found = set(roots)
    for node in gm.graph.nodes:
        reached = node.op == "call_function" and any(operand in found for operand in node.all_input_nodes)
        if reached and node not in but and not _only_sizes(node):
            found.add(node)
    return found


def _only_sizes(node: Node) -> bool:
    """Whether `node` makes no tensor: a size that is read off model data is not data."""
    return not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
