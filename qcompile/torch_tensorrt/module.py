"""A quantized graph as an ordinary Torch-TensorRT module, for the GPU at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from qcompile.errors import EngineError
from qcompile.torch_tensorrt.environment import require_torch_tensorrt
from qcompile.torch_tensorrt.lower import BlockFp8, lower, settings


def compile_module(
    gm: GraphModule, example_inputs: Sequence[Any], *, block_fp8: BlockFp8 = "k_split", name: str = "qcompile"
) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """Build an engine for the GPU at hand, and a function that runs it in the place of `gm`.

    Args:
        gm: a quantized program with its weights as `get_attr` and a flat list of outputs; it is lowered in place.
        example_inputs: what `gm` is called with. Sizes among them (SymInt) are read off the tensors instead. A dynamic
            size has the range that Torch-TensorRT gives it: that of `mark_dynamic`, else from 1 to 4096 times as much.
        block_fp8: as in `qcompile.export_onnx`.
        name: what logs call the engine.

    Returns:
        A function of the same inputs that gives a tuple of the outputs; what `gm` returns as None is None.

    Raises:
        EngineError: torch_tensorrt is not there, an operator has no converter, or TensorRT builds no engine.
    """
    require_torch_tensorrt()
    from torch_tensorrt.dynamo.conversion import convert_module
    from torch_tensorrt.dynamo.partitioning import construct_submodule_inputs

    (results,) = gm.graph.output_node().args
    assert isinstance(results, (list, tuple))
    count = len(results)
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(example_inputs) != len(placeholders):
        raise EngineError(f"the graph has {len(placeholders)} inputs, and there are {len(example_inputs)} examples")
    read = [index for index, node in enumerate(placeholders) if isinstance(node.meta.get("val"), torch.Tensor)]
    with torch.no_grad():
        kept = lower(gm, block_fp8)
    try:
        engine = convert_module(gm, construct_submodule_inputs(gm), settings(), name)
    except Exception as error:  # converters and the builder raise whatever they like
        raise EngineError(f"Torch-TensorRT built no engine: {str(error).strip().partition(chr(10))[0]}") from error

    def run(*inputs: Any) -> tuple[torch.Tensor | None, ...]:
        made = engine(*(inputs[index] for index in read))
        made = (made,) if isinstance(made, torch.Tensor) else tuple(made)
        given = dict(zip(kept, made, strict=True))
        return tuple(given.get(index) for index in range(count))

    return run
