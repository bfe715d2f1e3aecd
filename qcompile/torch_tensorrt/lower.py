"""The graph that Torch-TensorRT gets: that of the ONNX route, with operators that it has converters for."""

from __future__ import annotations

import operator
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node

from passes.base import run_pipeline
from passes.graph import aten, bounds, place_of, val
from passes.legalize.attention_operator import SHORT
from passes.pipelines import BLOCKS_TO_CHANNELS, TENSORRT, TENSORRT_KERNELS, boundary
from passes.sdpa import SDPA, Attention
from qcompile.errors import EngineError
from qcompile.torch_tensorrt.decompose import Table, attention, decompose, rms_norm
from qcompile.torch_tensorrt.environment import require_torch_tensorrt

BlockFp8 = Literal["k_split", "per_channel"]
_BLOCK_FP8 = {"k_split": (), "per_channel": BLOCKS_TO_CHANNELS}
_OWN: Table = {aten.rms_norm.default: rms_norm, SDPA: attention}  # written otherwise than Torch-TensorRT would
_SHOWN = 5  # operators without a converter that a message lists


def lower(gm: GraphModule, block_fp8: BlockFp8 = "k_split", io_dtype: torch.dtype | None = None) -> list[int]:
    """Run the pipeline of the ONNX route on `gm`, in place, and decompose what has no converter.

    Args:
        gm: a quantized program with its weights as `get_attr`.
        block_fp8, io_dtype: as in `qcompile.export_onnx`.

    Returns:
        The positions of the outputs that are tensors; those that are None are no longer there.

    Raises:
        EngineError: an operator has no converter; it is named with its module path.
    """
    require_torch_tensorrt()
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS
    from torch_tensorrt.dynamo.lowering import get_decompositions

    from qcompile.torch_tensorrt.converters import OURS

    if block_fp8 not in _BLOCK_FP8:
        raise EngineError(f"unknown block_fp8 {block_fp8!r}; known: {', '.join(_BLOCK_FP8)}")
    run_pipeline((*TENSORRT_KERNELS, *_BLOCK_FP8[block_fp8], *TENSORRT, *boundary(io_dtype)), gm)
    sizes_of_inputs(gm)
    kept = _tensor_outputs(gm)
    for node in gm.graph.nodes:
        node.meta[OURS] = True
        # Torch-TensorRT takes items off it, and the caller's program has the same one
        node.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack", {}))

    def has_converter(node: Node) -> bool:
        if node.target is operator.getitem:
            return True
        if node.target is SDPA:
            return _is_long_causal(Attention.of(node))
        return node.target not in _OWN and DYNAMO_CONVERTERS.get(node) is not None

    DYNAMO_CONVERTERS.set_compilation_settings(settings())
    table = {**get_decompositions(decompose_attention=False), **_OWN}
    decompose(gm, table, DYNAMO_CONVERTERS.unique_targets() - set(_OWN), has_converter)
    _require_converters(gm, has_converter)
    return kept


def _is_long_causal(call: Attention) -> bool:
    """Whether TensorRT's layer is the better form, as for quantized attention. Others take fewer kernels decomposed."""
    q, k, v = (val(operand).shape for operand in (call.q, call.k, call.v))
    plain = call.is_causal and call.mask is None and len(q) == 4 and k[-1] == v[-1] and isinstance(q[-1], int)
    return plain and bounds(k[2])[1] > SHORT


def settings() -> Any:
    """What is set of Torch-TensorRT: float64, which TensorRT has not, becomes float32, and a graph is one engine."""
    from torch_tensorrt.dynamo import CompilationSettings

    return CompilationSettings(truncate_double=True, require_full_compilation=True, min_block_size=1)


def sizes_of_inputs(gm: GraphModule) -> None:
    """Sizes that Dynamo hands in as inputs of their own are read off a tensor; an input that nothing reads goes."""
    known: dict[Any, tuple[Node, int]] = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    for node in placeholders:
        if isinstance(node.meta.get("val"), torch.Tensor):
            for axis, size in enumerate(val(node).shape):
                if isinstance(size, torch.SymInt):
                    known.setdefault(size.node.expr, (node, axis))
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            continue
        if node.users:
            if not isinstance(value, torch.SymInt) or value.node.expr not in known:
                raise EngineError(f"the input {node.name!r} is a number, and a TensorRT engine takes tensors only")
            source, axis = known[value.node.expr]
            with gm.graph.inserting_after(placeholders[-1]):
                size = gm.graph.call_function(aten.sym_size.int, (source, axis))
            size.meta = dict(node.meta)
            node.replace_all_uses_with(size)
        gm.graph.erase_node(node)
    gm.recompile()


def _tensor_outputs(gm: GraphModule) -> list[int]:
    """Take the outputs that are None off the graph, and give each other one a node of its own that is no input."""
    output = gm.graph.output_node()
    (results,) = output.args
    assert isinstance(results, (list, tuple))
    kept = [index for index, result in enumerate(results) if result is not None]
    nodes: list[Node] = []
    for index in kept:
        node = results[index]
        if not isinstance(node, Node) or not isinstance(val(node), torch.Tensor):
            raise EngineError(f"the program returns {node!r}, but a TensorRT engine can return tensors only")
        if node.op != "call_function" or node in nodes:
            with gm.graph.inserting_before(output):
                copy = gm.graph.call_function(aten.clone.default, (node,))
            copy.meta = dict(node.meta)
            node = copy
        nodes.append(node)
    output.args = (tuple(nodes),)
    gm.recompile()
    return kept


def _require_converters(gm: GraphModule, has_converter: Any) -> None:
    missing = [node for node in gm.graph.nodes if node.op == "call_function" and not has_converter(node)]
    if missing:
        lines = [f"  {place_of(node)}: {node.target}" for node in missing[:_SHOWN]]
        more = f"\n  and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise EngineError(
            "Torch-TensorRT has no converter for these operators, or not with these arguments; "
            "route='onnx' may know them:\n" + "\n".join(lines) + more
        )
