"""Quantize/dequantize pairs around a tensor of the graph: how they are added, and how they are recognised."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from passes.constants import add_constant, replace_with_constant, root_constants
from passes.errors import PassError
from passes.formats import Format, get_format
from passes.graph import Emitter, dtype, is_call
from passes.ir import DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE


def checked(scale: torch.Tensor, name: str) -> torch.Tensor:
    """`scale` in float32. Raises `PassError` for a NaN, an infinity or a number that is not positive."""
    result = scale.detach().float()
    if not bool((torch.isfinite(result) & (result > 0)).all()):
        raise PassError(f"{name} holds {float(result.min()):.3g} to {float(result.max()):.3g}: scales are positive")
    return result


def constant_pair(gm: GraphModule, x: Node, scale: torch.Tensor, fmt: Format, name: str, emit: Emitter) -> Node:
    """`dequantize(quantize(x))` with the constant `scale`, called `name`: `x.input_scale`.

    In a format of two levels it is the global one, called `x.input_global_scale`.
    """
    if fmt.scale is not None:
        name = f"{name.removesuffix('scale')}global_scale"
        return measured_pair(x, fmt, emit, add_constant(gm, name, scale, emit.before))
    node = add_constant(gm, name, scale, emit.before)
    return emit(DEQUANTIZE, emit(QUANTIZE, x, node, format=fmt.name), node, format=fmt.name, dtype=dtype(x))


def measured_pair(x: Node, fmt: Format, emit: Emitter, global_scale: Node | None = None) -> Node:
    """`dequantize(dynamic_quantize(x))`: scales are measured at run time, of two levels under `global_scale`."""
    pair = emit(DYNAMIC_QUANTIZE, x, global_scale, format=fmt.name)
    codes, scale = emit.getitem(pair, 0), emit.getitem(pair, 1)
    if fmt.scale is not None:
        scale = emit(DEQUANTIZE, scale, global_scale, format=fmt.scale.name, dtype=torch.float32)
    return emit(DEQUANTIZE, codes, scale, format=fmt.name, dtype=dtype(x))


def chosen_pair(
    gm: GraphModule,
    weight: Node,
    global_scale: torch.Tensor | None,
    block_scales: torch.Tensor,
    fmt: Format,
    name: str,
    emit: Emitter,
) -> Node:
    """`dequantize(quantize(weight))` with constant scales of its blocks, named as `FoldWeights` names measured ones."""
    blocks = torch.nn.Parameter(block_scales, requires_grad=False)
    if fmt.scale is not None:
        assert global_scale is not None
        stem = name.removesuffix("scale")
        above = add_constant(gm, f"{stem}global_scale", global_scale, emit.before)
        own = add_constant(gm, str(above.target).replace("global_scale", "block_scale"), blocks, emit.before)
        scale = emit(DEQUANTIZE, own, above, format=fmt.scale.name, dtype=torch.float32)
    else:
        scale = add_constant(gm, f"{root_constants(weight)[0].target}_scale", blocks, emit.before)
    return emit(DEQUANTIZE, emit(QUANTIZE, weight, scale, format=fmt.name), scale, format=fmt.name, dtype=dtype(weight))


def store_codes(gm: GraphModule, quantize: Node, codes: torch.Tensor) -> None:
    """Put `codes` in the place of the `quantize` of a constant, in front of the scales of its blocks."""
    scale = quantize.args[1]
    quantize.update_arg(1, None)  # so that the weight alone names the codes
    if isinstance(scale, Node) and get_format(str(quantize.kwargs["format"])).sizes:
        first = scale.args[0] if is_call(scale, DEQUANTIZE) else scale
        assert isinstance(first, Node)
        first.prepend(quantize)
    replace_with_constant(gm, quantize, codes)


def measured_by(pair: object) -> Node | None:
    """The dynamic quantize whose codes `pair` dequantizes; None if it is anything else."""
    codes = pair.args[0] if isinstance(pair, Node) and is_call(pair, DEQUANTIZE) else None
    if not isinstance(codes, Node) or not is_call(codes, operator.getitem) or codes.args[1] != 0:
        return None
    (source,) = codes.all_input_nodes
    return source if is_call(source, DYNAMIC_QUANTIZE) else None


def name_quantizer(pair: Node, name: str) -> None:
    """Note on both halves of `pair` which quantizer they are."""
    quantize = measured_by(pair) or pair.args[0]
    for node in (pair, quantize):
        assert isinstance(node, Node)
        node.meta["custom"] = {**node.meta.get("custom", {}), "quantizer": name}
