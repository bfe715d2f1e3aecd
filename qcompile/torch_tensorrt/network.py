"""Fills a TensorRT network with a lowered graph, by Torch-TensorRT's interpreter, and keeps track of what is what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.fx import GraphModule, Node

from passes.graph import val
from passes.program import unlift
from qcompile.capture.signature import interface_problem, output_names, tensor_inputs
from qcompile.errors import EngineError
from qcompile.process import alone
from qcompile.torch_tensorrt.environment import require_torch_tensorrt, tensorrt_package
from qcompile.torch_tensorrt.lower import BlockFp8, lower


@dataclass
class Filled:
    """What a network was made of.

    Attributes:
        modules: the module path of each layer.
        dimensions: input name -> its dimensions: a size, or the name of a dynamic one.
        tensors: tensors of the network, each with the node whose value it is.
        interpreter: owns the memory of the weights, which TensorRT reads when it builds.
    """

    modules: list[str] = field(default_factory=list)
    dimensions: dict[str, list[int | str]] = field(default_factory=dict)
    tensors: list[tuple[Any, Node]] = field(default_factory=list)
    interpreter: Any = None

    def static_shapes(self, minima: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor where the inputs have the shapes `minima`, as far as that tells."""
        sizes: dict[Any, int] = {}
        for tensor, node in self.tensors:
            if node.op == "placeholder":
                for size, least in zip(val(node).shape, minima.get(tensor.name, ()), strict=False):
                    if isinstance(size, torch.SymInt):
                        sizes[size.node.expr] = least
        shapes = {}
        for tensor, node in self.tensors:
            dims = [d.node.expr.xreplace(sizes) if isinstance(d, torch.SymInt) else d for d in val(node).shape]
            if all(isinstance(d, int) or d.is_Integer for d in dims):
                shapes[tensor.name] = tuple(map(int, dims))
        return shapes


class ProgramNetwork:
    """A quantized program as the layers of a TensorRT network: what `qcompile.engine.build_network` builds."""

    def __init__(
        self, program: ExportedProgram, block_fp8: BlockFp8 = "k_split", io_dtype: torch.dtype | None = None
    ) -> None:
        """Lower `program`, which is not changed.

        Raises:
            EngineError: torch_tensorrt is not there, or the program has an operator, input or output that it has no
                form for.
        """
        self.package = tensorrt_package()
        if problem := interface_problem(program, "a TensorRT engine"):
            raise EngineError(problem)
        with alone(), torch.no_grad():  # or torch traces the forms that have gradients
            self._gm = unlift(program)
            lower(self._gm, block_fp8, io_dtype)
        given = {spec.arg.name for spec in program.graph_signature.input_specs if isinstance(spec.arg, TensorArgument)}
        self._inputs = [name for _, name in tensor_inputs(program) if name in given]  # sizes are read off tensors
        self._outputs = output_names(program)

    @property
    def graph_module(self) -> GraphModule:
        """The lowered graph, weights and all."""
        return self._gm

    def fill(self, network: Any) -> Filled:
        """Add all layers to `network`. Raises EngineError with the operator and module that failed."""
        return fill_network(self._gm, network, self._inputs, self._outputs)


def fill_network(gm: GraphModule, network: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Filled:
    """Convert the lowered graph `gm`; inputs and outputs get the given names, which no other tensor then has."""
    require_torch_tensorrt()
    from qcompile.torch_tensorrt.interpreter import NetworkInterpreter

    filled = Filled()
    with alone():
        filled.interpreter = NetworkInterpreter(gm, network, filled, inputs, outputs)
        filled.interpreter.convert()
    return filled
