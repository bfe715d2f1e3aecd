"""Torch-TensorRT's interpreter with a network of ours, names of ours, and errors that say where.

This module imports torch_tensorrt, so it is itself imported inside functions only.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import tensorrt as trt
import torch
from torch.fx import GraphModule, Node
from torch_tensorrt.dynamo.conversion import TRTInterpreter

from passes.graph import module_path, val
from qcompile.compat.torch_tensorrt import construct, dtype_of, output_dtypes
from qcompile.errors import EngineError
from qcompile.torch_tensorrt.lower import settings


class NetworkInterpreter(TRTInterpreter):  # type: ignore[misc]  # torch_tensorrt is not annotated
    """Adds the layers of a graph to a network that the caller has made, and builds nothing."""

    def __init__(
        self, gm: GraphModule, network: Any, filled: Any, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        with _without_note_on_loggers():
            super().__init__(
                gm,
                [],  # profiles are the business of whoever builds
                output_dtypes=output_dtypes(gm),
                compilation_settings=settings(),
                output_binding_names=outputs,
            )
        self.ctx.net = network
        del self.builder  # while one lives, TensorRT logs to the logger of that, and to no other
        self.extra_traceback = False  # torch.fx would add its own to messages that say where already
        self._filled, self._names = filled, iter(inputs)
        self._taken = {*inputs, *outputs}

    def convert(self) -> None:
        construct(self)

    def placeholder(self, target: str, args: Any, kwargs: Any) -> Any:
        assert self._cur_node is not None
        name, tensor = next(self._names), val(self._cur_node)
        dims = [str(size.node.expr) if isinstance(size, torch.SymInt) else int(size) for size in tensor.shape]
        kind = dtype_of(tensor.dtype).to(trt.DataType, use_default=True)
        added = self.ctx.net.add_input(name, kind, tuple(d if isinstance(d, int) else -1 for d in dims))
        for axis, dim in enumerate(dims):
            if isinstance(dim, str):
                added.set_dimension_name(axis, dim)  # TensorRT then knows which sizes are equal
        self._filled.dimensions[name] = dims
        return added

    def run_node(self, n: Node) -> Any:
        first, path = self.ctx.net.num_layers, module_path(n)
        stack = n.meta.get("nn_module_stack", {})
        n.meta["nn_module_stack"] = dict(stack)  # Torch-TensorRT takes the last item off it
        try:
            result = super().run_node(n)
        except Exception as error:  # converters raise whatever they like
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise EngineError(
                f"{path or n.name}: Torch-TensorRT could not convert {n.target} ({n.name}): {reason}"
            ) from error
        finally:
            n.meta["nn_module_stack"] = stack
        if isinstance(result, trt.ITensor) and isinstance(val(n), torch.Tensor):
            self._filled.tensors.append((result, n))
        for index in range(first, self.ctx.net.num_layers):
            layer = self.ctx.net.get_layer(index)
            layer.name = self._unique(self._name(layer, n))
            self._filled.modules.append(path)
        return result

    def _name(self, layer: Any, node: Node) -> str:
        """A constant is called like the weight it holds, another layer after its node."""
        if layer.type == trt.LayerType.CONSTANT:
            size = math.prod(layer.get_output(0).shape)
            roots = [n for n in node.all_input_nodes if n.op == "get_attr"]
            holds = [n for n in roots if size in (val(n).numel(), 2 * val(n).numel())]  # two FP4 codes are a byte
            if len(holds) == 1:
                return str(holds[0].target)
        return f"{node.name}.{layer.type.name.lower()}"

    def _unique(self, name: str) -> str:
        unique, count = name, 0
        while unique in self._taken:
            count += 1
            unique = f"{name}_{count}"
        self._taken.add(unique)
        return unique


@contextlib.contextmanager
def _without_note_on_loggers() -> Iterator[None]:
    """The base class makes a builder of its own, of whose logger TensorRT says that it is not used."""

    def other(record: logging.LogRecord) -> bool:
        return "differs from one already registered" not in record.getMessage()

    logger = logging.getLogger("torch_tensorrt [TensorRT Conversion Context]")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
