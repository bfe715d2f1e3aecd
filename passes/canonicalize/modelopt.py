"""Fake quantization of nvidia-modelopt becomes quantize and dequantize."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.canonicalize.symmetric import from_symmetric, to_symmetric
from passes.constants import add_constant, constant, delete_constant, evaluate_constant, is_constant_expression
from passes.errors import PassError
from passes.formats import FP8, FP8_128X128, FP8_PER_TOKEN, INT4_GROUPS, INT8, INT8_PER_TOKEN, NVFP4, Format
from passes.graph import Emitter, argument, aten, is_call, module_path, only_user, place_of, shape, strip, val
from passes.ir import DEQUANTIZE, quantize
from passes.pairs import checked, chosen_pair, constant_pair, measured_pair, name_quantizer

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_STATIC = ("tensorrt::quantize_op", "qcompile_modelopt::quantize_op")  # the latter of integers under Dynamo
_BLOCKS = "tensorrt::dynamic_block_quantize_op"
_FORMATS = {(8, 4): FP8, (8, 0): INT8}  # bits, bits of the exponent
_PER_TOKEN = {FP8: FP8_PER_TOKEN, INT8: INT8_PER_TOKEN}
_NO_AMAX = 2.0**-24  # modelopt takes this and less for zero, and 1 in its place


class ModeloptToQdq(Pass):
    """Spell out what nvidia-modelopt's quantizers compute, with the amax that they hold.

    Before:
        y = linear(quantize_op(x, amax, 8, 4), dynamic_block_quantize_op(w, 16, amax, 4, 2, 8, 4))
    After:
        y = linear(dequantize(quantize(x, amax / 448), amax / 448), <the two-level chain of w under amax / 2688>)

    Requires: a graph captured in modelopt's export mode or by Dynamo (`qcompile.frontends.modelopt`). Operators are
        found by name, so the package need not be installed.
    Ensures: fp32 models get modelopt's codes, up to ties that x * (448 / amax) and x / (amax / 448) round apart. What
        modelopt measures at run time (per token, per tensor) stays measured. The quantizer of a softmax goes:
        `FuseAttentionQdq` gives every attention its own, as a scale of 1/448 needs no calibration.
    Declines when: never; raises `PassError` naming the quantizer whose format the IR does not carry, or whose amax is
        in another graph.
    Why: one graph, whoever put the quantizers there; weights stay floating point until `FoldWeights`, as in our own.
    """

    def rewrite(self, gm: GraphModule) -> None:
        for node in list(gm.graph.nodes):
            if (schema := _schema(node)) in (*_STATIC, _BLOCKS):
                replacement = self._replacement(gm, node, _format(node, schema))
                node.replace_all_uses_with(replacement)
                gm.graph.erase_node(node)
                self.fire()

    def _replacement(self, gm: GraphModule, node: Node, fmt: Format) -> Node:
        x = node.args[0]
        assert isinstance(x, Node)
        emit = Emitter(node)
        path = module_path(node)
        # the quantizer is a module of its own: what it quantizes belongs to the layer around it
        stack = dict(list(node.meta.get("nn_module_stack", {}).items())[:-1]) if _is_quantizer(path) else None
        if stack is not None:
            node.meta["nn_module_stack"] = stack
        if is_call(strip(x, aten._to_copy.default, aten.clone.default), *_SOFTMAX):
            return x
        amax = _amax(gm, node, x)
        name = _scale_name(path)
        if fmt in INT4_GROUPS.values():
            return _groups(gm, node, fmt, amax, emit)
        if amax is None:
            pair = _measured(node, x, fmt, emit)
        elif (weight := _blocked_weight(x)) is not None:  # of one block, perhaps
            return _blocks(gm, node, weight, amax.expand(shape(x)[0], 1, shape(x)[2], 1), emit)
        elif amax.numel() == 1:
            pair = _per_tensor(gm, node, x, amax.reshape(()), fmt, name, emit)
        elif is_constant_expression(x) and fmt.scale is None and amax.shape[0] == amax.numel():
            pair = constant_pair(gm, x, amax / fmt.max, fmt, name, emit)
        else:
            raise PassError(
                f"{path or node.name}: an amax of shape {tuple(amax.shape)} for {tuple(shape(x))} elements is neither"
                " per tensor, nor per output channel of a weight, nor for 128 x 128 blocks of one"
            )
        name_quantizer(pair, path)
        return pair


def _schema(node: Node) -> str | None:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else None


def _is_quantizer(path: str) -> bool:
    return path.rpartition(".")[2].endswith("quantizer")


def _scale_name(path: str) -> str:
    """`x.q_proj.input_quantizer` -> `x.q_proj.input_scale`; of an attention, `k_bmm_quantizer` -> `k_scale`."""
    owner, _, quantizer = path.rpartition(".")
    operand = quantizer.removesuffix("quantizer").removesuffix("_").removesuffix("_bmm") or "tensor"
    return f"{owner}.{operand}_scale" if owner else f"{operand}_scale"


def _format(node: Node, schema: str) -> Format:
    """The format of a quantizer. Raises `PassError` if the IR has none for its bits."""
    bits = (argument(node, "num_bits"), argument(node, "exponent_bits"))
    if schema in _STATIC:
        found, blocks = _FORMATS.get(bits), ""
        if bits == (4, 0):
            size = shape(node)[-1]
            found, blocks = INT4_GROUPS.get(int(size)) if len(shape(node)) == 2 else None, f" in groups of {size}"
    else:
        size = argument(node, "block_size")
        scale = (argument(node, "scale_num_bits"), argument(node, "scale_exponent_bits"))
        found = NVFP4 if (bits, size, scale) == ((4, 2), 16, (8, 4)) else None
        blocks = f" in blocks of {size} with scales of {scale[0]} bits, {scale[1]} of them exponent"
    if found is None:
        raise PassError(
            f"{place_of(node)}: nvidia-modelopt quantizes to {bits[0]} bits, {bits[1]} of them exponent"
            f"{blocks}; qcompile knows FP8 (E4M3), INT8, NVFP4, and INT4 in groups of 32, 64 or 128 for weights."
            " Choose one of those, or disable this quantizer"
        )
    return found


def _amax(gm: GraphModule, node: Node, x: Node) -> torch.Tensor | None:
    """The calibrated amax in fp32, that of a weight measured here; None if it is measured at run time."""
    operand = argument(node, "amax")
    assert isinstance(operand, Node)
    where = f"amax of {place_of(node)}"
    if is_constant_expression(operand):
        amax = evaluate_constant(gm, operand).float()
    elif is_constant_expression(x):
        kept = [axis for axis, size in enumerate(shape(operand)) if size == 1]
        amax = evaluate_constant(gm, x).float().abs().amax(kept, keepdim=True)
    else:
        return None
    return checked(torch.where(amax.abs() <= _NO_AMAX, 1.0, amax), where)


def _per_tensor(
    gm: GraphModule, node: Node, x: Node, amax: torch.Tensor, fmt: Format, name: str, emit: Emitter
) -> Node:
    if fmt is not INT8 or is_constant_expression(x):
        return constant_pair(gm, x, amax / fmt.global_max, fmt, name, emit)
    unsigned, narrow = argument(node, "unsigned"), argument(node, "narrow_range")
    scale = amax / (255.0 if unsigned else INT8.max)
    zero_point = int(INT8.min) if unsigned else 0
    low = -int(INT8.max) if narrow and not unsigned else int(INT8.min)
    source = to_symmetric(x, float(scale), zero_point, low, int(INT8.max), emit)
    return from_symmetric(constant_pair(gm, source, scale, fmt, name, emit), float(scale), zero_point, emit)


def _measured(node: Node, x: Node, fmt: Format, emit: Emitter) -> Node:
    """An amax that is computed from `x` at run time, for the tensor or for each token."""
    amax = argument(node, "amax")
    if _sources(amax).isdisjoint(_sources(x)):
        raise PassError(
            f"{place_of(node)}: the amax comes from outside of this graph. If torch.compile ran in this process before"
            " nvidia-modelopt was imported, call torch._dynamo.reset() and run the compiled model again; if not, look"
            " for a graph break inside of the quantizer (TORCH_LOGS=graph_breaks)"
        )
    if val(amax).numel() == 1:
        if fmt.scale is None:
            return measured_pair(x, fmt, emit)
        scalar = emit(aten.reshape.default, amax, [])
        if val(scalar).dtype != torch.float32:
            scalar = emit(aten._to_copy.default, scalar, dtype=torch.float32)
        return measured_pair(x, fmt, emit, emit(aten.div.Tensor, scalar, fmt.global_max))
    if fmt in _PER_TOKEN and tuple(shape(amax)) == (*shape(x)[:-1], 1):
        return measured_pair(x, _PER_TOKEN[fmt], emit)
    raise PassError(
        f"{place_of(node)}: the amax is measured at run time with shape {tuple(shape(amax))}, which is"
        " neither for the tensor nor for each token"
    )


def _sources(node: Node) -> set[Node]:
    """`node` and what it is computed from, constants aside."""
    found, reached = {node}, [node]
    while reached:
        reached = [i for n in reached for i in n.all_input_nodes if i not in found and i.op != "get_attr"]
        found.update(reached)
    return found


def _blocked_weight(x: Node) -> Node | None:
    """`w` if `x` is `view(pad(w), [N / 128, 128, K / 128, 128])`: a weight taken apart into blocks."""
    source = strip(x, aten.view.default, aten.reshape.default, aten.pad.default, aten.constant_pad_nd.default)
    is_weight = len(shape(x)) == 4 and is_constant_expression(source) and len(shape(source)) == 2
    return source if is_weight else None


def _groups(gm: GraphModule, node: Node, fmt: Format, amax: torch.Tensor | None, emit: Emitter) -> Node:
    """An INT4 weight under modelopt's own scale for each group of a row; `FoldWeights` makes the codes."""
    weight, sizes = strip(node.all_input_nodes[0], aten.view.default, aten.reshape.default), shape(node)
    whole = not is_call(weight, aten.pad.default, aten.constant_pad_nd.default)
    if amax is None or amax.numel() != sizes[0] or not whole or not is_constant_expression(weight):
        raise PassError(
            f"{place_of(node)}: INT4 is for weights, with an amax for each group of a row, and for whole groups"
        )
    scale = (amax / fmt.max).reshape(*shape(weight)[:-1], -1)
    pair = chosen_pair(gm, weight, None, scale, fmt, _scale_name(module_path(node)), emit)
    last = node
    while (user := only_user(last)) is not None and shape(last) != shape(weight):
        last = user
    last.replace_all_uses_with(pair)
    return pair


def _blocks(gm: GraphModule, node: Node, weight: Node, amax: torch.Tensor, emit: Emitter) -> Node:
    """The weight as codes, with modelopt's own scale for each block of 128 x 128.

    The padding at the end of ragged sides goes, as scales of blocks do not need it. Codes can be made here, as nothing
    rounds the scales of blocks later.
    """
    fmt, sizes = FP8_128X128, shape(node)
    if _format(node, _STATIC[0]) is not FP8 or (sizes[1], sizes[3]) != fmt.sizes:
        raise PassError(f"{place_of(node)}: weights in blocks are FP8 in 128 x 128; these are {sizes}")
    scale = (amax / fmt.max).reshape(amax.shape[0], amax.shape[2])
    codes = quantize(evaluate_constant(gm, weight), scale, format=fmt.name)
    name = str(weight.target) if weight.op == "get_attr" else _scale_name(module_path(node)).removesuffix("_scale")
    if constant(gm, weight) is not None and only_user(weight) is not None:
        delete_constant(gm, name)
    stored = add_constant(gm, name, torch.nn.Parameter(codes, requires_grad=False), node)
    scales = add_constant(gm, f"{name}_scale", torch.nn.Parameter(scale, requires_grad=False), node)
    last = node
    while (user := only_user(last)) is not None and shape(last) != shape(weight):
        last = user
    pair = emit(DEQUANTIZE, stored, scales, format=fmt.name, dtype=val(node).dtype)
    last.replace_all_uses_with(pair)
    return pair
