"""Graphs of pt2e quantizers become the IR."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.canonicalize.symmetric import from_symmetric, to_symmetric
from passes.constants import (
    add_constant,
    constant,
    delete_constant,
    evaluate_constant,
    is_constant_expression,
    root_constants,
    scalar,
)
from passes.errors import PassError
from passes.formats import INT8, INT8_PER_TOKEN, Format
from passes.graph import Emitter, argument, aten, dtype, is_call, module_path, name_in_module, place_of, shape
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.normalize.convolution import SPELLINGS
from passes.pairs import checked, measured_pair
from passes.subgraphs import all_nodes

_SPACE = "quantized_decomposed"
_SHIFTS = {torch.int8: 0, torch.uint8: 128}
_MEASURED = {"choose_qparams_symmetric": INT8, "choose_qparams_per_token": INT8_PER_TOKEN}
_LAYERS = (aten.linear.default, *SPELLINGS)  # before they are normalized
_PAIRED = ("per_tensor", "per_channel", "per_token")


@dataclass(frozen=True)
class _Affine:
    """`codes = clamp(round(x / scale) + zero_point, low, high)`, in int8.

    Attributes:
        scale: fp32 scalar, or one for each channel with axes of one element to broadcast.
        zero_point: of the same shape.
        low, high: the smallest and the largest code.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    low: int
    high: int


class Pt2eToQdq(Pass):
    """Write the quantize and dequantize of `quantized_decomposed` in the operators of the IR, all of them in int8.

    Before:
        q = quantize_per_tensor(x, s, z, 0, 255, uint8)
        y = linear(dequantize_per_tensor(q, s, z, ...), dequantize_per_channel(w8, sw, 0, ...), b)
    After:
        y = linear(sub(dequantize(quantize(add(x, s * (z - 128)), s), s), s * (z - 128)), dequantize(w8, sw), b)

    Requires: the graph of `convert_pt2e`, captured; weights folded to codes or not.
    Ensures: the same codes less 128 where they were unsigned, up to ties and the rounding of `x + s z`; a range
        narrower than int8 becomes a clamp. Codes of weights are taken as they are, or made here by the formula of pt2e.
    Declines when: a weight has zero points: it is right, but no GEMM of integers.
    Raises: PassError for what int8 codes with constant or symmetric run-time scales cannot say: other integers, groups
        inside a channel, run-time zero points, codes that something else reads.
    Why: the zero points that back ends fuse are zeros.
    """

    def check_ensures(self, gm: GraphModule) -> list[str]:
        names = [(node, _name(node)) for node in all_nodes(gm)]
        left = [node for node, name in names if name is not None and not name.startswith("choose_qparams")]
        return [f"{node.target} is left at {place_of(node)}" for node in left]

    def rewrite(self, gm: GraphModule) -> None:
        for node in list(gm.graph.nodes):
            name = _name(node)
            if name is None or name.startswith("choose_qparams"):
                continue
            kind, _, granularity = name.partition("_")
            if kind not in ("quantize", "dequantize") or granularity not in _PAIRED:
                raise PassError(
                    f"{place_of(node)}: {node.target} is not a form that qcompile reads; known are per"
                    " tensor, per channel and per token"
                )
            if kind == "dequantize":
                self._dequantize(gm, node)
        for node in [n for n in gm.graph.nodes if (_name(n) or "").startswith("quantize")]:
            if node.users:
                self._quantize(gm, node)

    def _dequantize(self, gm: GraphModule, node: Node) -> None:
        codes = node.args[0]
        assert isinstance(codes, Node)
        emit = Emitter(node, like=_reader(node))
        measured = _measured(node)
        if measured is not None:
            if not _is_quantize(codes):
                raise PassError(f"{place_of(node)}: codes with a run-time scale come from {codes.target}")
            source = codes.args[0]
            assert isinstance(source, Node)
            result = measured_pair(source, measured, emit)
        else:
            result = self._constant(gm, node, codes, emit)
        node.replace_all_uses_with(result)
        gm.graph.erase_node(node)
        self.fire()

    def _constant(self, gm: GraphModule, node: Node, codes: Node, emit: Emitter) -> Node:
        affine = _affine(gm, node)
        stored = constant(gm, codes)
        reader = _reader(node)
        is_weight = is_call(reader, *_LAYERS) and reader.args[1] is node
        name = name_in_module(reader, "weight" if is_weight else "input")
        if stored is not None:
            shift = _SHIFTS[argument(node, "dtype")]
            codes = _keep(gm, name, (stored.short() - shift).to(torch.int8), node)
        scale = add_constant(gm, f"{name}_scale", affine.scale, node)
        result = emit(DEQUANTIZE, codes, scale, format=INT8.name, dtype=dtype(node))
        if affine.zero_point.ndim == 0:
            return from_symmetric(result, float(affine.scale), int(affine.zero_point), emit)
        if not bool(affine.zero_point.any()):
            return result
        self.decline("a weight with zero points is subtracted from at run time: use symmetric weights", node)
        offset = (affine.scale * affine.zero_point).to(dtype(node))
        return emit(aten.sub.Tensor, result, add_constant(gm, f"{name}_offset", offset, node))

    def _quantize(self, gm: GraphModule, node: Node) -> None:
        if others := [user for user in node.users if not is_call(user, DEQUANTIZE)]:
            raise PassError(f"{place_of(node)}: {others[0].target} reads codes; only dequantize may")
        x, affine = node.args[0], _affine(gm, node)
        assert isinstance(x, Node)
        user = next(iter(node.users))
        scale = user.args[1]
        assert isinstance(scale, Node)
        emit = Emitter(node, like=user)
        if is_constant_expression(x):
            weight = evaluate_constant(gm, x)
            codes = torch.round(weight * (1.0 / affine.scale)) + affine.zero_point  # by the formula of pt2e
            name = str(root_constants(x)[0].target)
            stored = _keep(gm, name, codes.clamp(affine.low, affine.high).to(torch.int8), node, dying=node)
        elif affine.zero_point.ndim:
            raise PassError(f"{module_path(user) or node.name}: activations with a scale for each channel")
        else:
            x = to_symmetric(x, float(affine.scale), int(affine.zero_point), affine.low, affine.high, emit)
            scale = add_constant(gm, str(scale.target), affine.scale, node)
            stored = emit(QUANTIZE, x, scale, format=INT8.name)
        for reader in list(node.users):
            reader.args = (stored, scale)
        gm.graph.erase_node(node)


def _name(node: Node) -> str | None:
    """`quantize_per_tensor` of `quantized_decomposed::quantize_per_tensor`; None for what is not of pt2e."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    space, _, name = node.target._schema.name.partition("::")
    return name if space == _SPACE else None


def _is_quantize(node: Node) -> bool:
    return (_name(node) or "").startswith("quantize_per")


def _reader(node: Node) -> Node:
    """The first user of `node`, which knows its module; `node` itself if there is none."""
    return next((user for user in node.users if user.op == "call_function"), node)


def _measured(node: Node) -> Format | None:
    """The format of a (de)quantize whose scale is measured at run time; None for a constant one."""
    scale = node.args[1]
    if not is_call(scale, operator.getitem):
        return None
    assert isinstance(scale, Node)
    chooser = scale.all_input_nodes[0]
    found = _MEASURED.get(_name(chooser) or "")
    if found is None or _SHIFTS.get(argument(node, "dtype")) != 0:
        raise PassError(
            f"{module_path(_reader(node)) or node.name}: {chooser.target} measures a zero point at run time; choose a"
            " quantizer with symmetric (int8) or static activations"
        )
    return found


def _affine(gm: GraphModule, node: Node) -> _Affine:
    """Scales and zero points of a node with constant ones, shifted to int8."""
    where = module_path(_reader(node)) or node.name
    codes = argument(node, "dtype")
    if codes not in _SHIFTS:
        raise PassError(f"{where}: {node.target} has codes of {codes}; qcompile reads int8 and uint8")
    shift = _SHIFTS[codes]
    low, high = int(argument(node, "quant_min")) - shift, int(argument(node, "quant_max")) - shift
    if not INT8.min <= low < high <= INT8.max:
        raise PassError(f"{where}: codes of {codes} between {low + shift} and {high + shift}")
    scale, zero_point = (_numbers(gm, node, value) for value in node.args[1:3])
    axis = argument(node, "axis")
    if axis is not None:
        sizes = [-1 if i == axis % len(shape(node)) else 1 for i in range(len(shape(node)))]
        scale, zero_point = scale.reshape(sizes), zero_point.reshape(sizes)
        if sizes[0] != -1:
            raise PassError(
                f"{where}: channels along axis {axis}; a weight has a scale for each output channel, axis 0"
            )
    return _Affine(checked(scale, f"scale of {where}"), (zero_point - shift).to(torch.int32), low, high)


def _numbers(gm: GraphModule, node: Node, value: object) -> torch.Tensor:
    """A number or constant as a tensor; one of a single element becomes a scalar, unless it stands for channels."""
    if value is None:  # of zero points
        return torch.zeros_like(_numbers(gm, node, node.args[1]))
    if isinstance(value, (int, float)):
        return torch.tensor(value)
    tensor = constant(gm, value)
    if tensor is None:
        number = scalar(gm, value)
        if number is None:
            raise PassError(
                f"{module_path(_reader(node)) or node.name}: the scale or zero point is computed at run time"
            )
        return torch.tensor(number)
    return tensor.detach().reshape(()) if tensor.numel() == 1 and "per_tensor" in str(node.target) else tensor.detach()


def _keep(gm: GraphModule, name: str, codes: torch.Tensor, before: Node, dying: Node | None = None) -> Node:
    """`codes` of a weight under the name of the float weight, if nothing but `dying` reads that."""
    floats = [n for n in gm.graph.nodes if n.op == "get_attr" and n.target == name]
    if floats and all(user is dying for n in floats for user in n.users):
        delete_constant(gm, name)
        for n in floats:
            if not n.users:
                gm.graph.erase_node(n)
    return add_constant(gm, name, torch.nn.Parameter(codes, requires_grad=False), before)
