"""Run calibration batches through a captured graph and keep the largest magnitude of chosen tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from passes.graph import aten
from qcompile.batches import flatten_batch, kind_of, pieces
from qcompile.errors import CalibrationError

_HALF = (torch.float16, torch.bfloat16)
# Operators that take rows of a table: to widen the table would take twice its memory for nothing.
_LOOKUPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default)


class _Observer(Interpreter):
    """Interprets a graph and records the running amax of some of its nodes.

    What no observed node depends on, such as a language model's head, is not run. On a CPU it computes a half-precision
    graph in float32: few kernels know half there, and a ViT takes ten times as long in it. Ranges are then those
    without the rounding in between.
    """

    def __init__(self, gm: GraphModule, observed: Iterable[Node]) -> None:
        super().__init__(gm)
        self.amax: dict[Node, torch.Tensor] = {node: torch.zeros((), dtype=torch.float32) for node in observed}
        self.needed = _ancestors(self.amax)
        self.on_cpu = all(tensor.device.type == "cpu" for tensor in (*gm.parameters(), *gm.buffers()))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.on_cpu and target not in _LOOKUPS:
            args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and n not in self.needed:
            return None
        result = super().run_node(n)
        if n in self.amax and result.numel():
            low, high = torch.aminmax(result.detach())
            # torch.maximum carries a NaN on, so one bad value is found at the end
            self.amax[n] = torch.maximum(self.amax[n], torch.maximum(-low, high).float().cpu())
        return result


def _ancestors(nodes: Iterable[Node]) -> set[Node]:
    """`nodes` and all that they are computed from."""
    found, pending = set(nodes), list(nodes)
    while pending:
        new = [operand for operand in pending.pop().all_input_nodes if operand not in found]
        found.update(new)
        pending += new
    return found


def _widened(argument: Any) -> Any:
    """A half-precision tensor, or the name of a half-precision dtype, as float32."""
    if isinstance(argument, torch.Tensor) and argument.dtype in _HALF:
        return argument.float()
    return torch.float32 if isinstance(argument, torch.dtype) and argument in _HALF else argument


def observe_amax(
    gm: GraphModule,
    program: ExportedProgram,
    observed: Mapping[Node, str],
    batches: Iterable[Any],
    *,
    progress: bool = True,
) -> dict[Node, torch.Tensor]:
    """Largest magnitude of each observed node over all batches.

    Args:
        gm: `unlift(program)`, or what normalization made of it.
        program: tells how inputs are flattened.
        observed: node -> name of the quantizer, for messages.
        batches: argument tuples, keyword dicts or single tensors; a batch of another size than the captured one is run
            in pieces of that size.

    Returns:
        node -> fp32 scalar.

    Raises:
        CalibrationError: no batch, a batch that does not fit what was captured, or NaN or inf in an observed tensor.
    """
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise CalibrationError(f"calibration is a list of batches, not a {kind_of(batches)}; put one batch in a list")
    observer, count = _Observer(gm, observed), 0
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    total = len(batches) if isinstance(batches, Sized) else None
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not progress) as bar, torch.no_grad():
        task = bar.add_task("calibrating", total=total)
        for batch in batches:
            name = f"calibration batch {count}"
            for inputs in pieces(flatten_batch(batch, program, name), placeholders, name):
                _run(observer, inputs, name)
            count += 1
            bar.advance(task)
    if not count:
        raise CalibrationError("the calibration data is empty")
    for node, name in observed.items():
        if not bool(torch.isfinite(observer.amax[node])):
            raise CalibrationError(f"{name}: calibration found {float(observer.amax[node])} in {node.name}")
    return observer.amax


def _run(observer: _Observer, inputs: list[Any], name: str) -> None:
    try:
        observer.run(*inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # what operators say of values they cannot take
        reason = str(error).partition("\n")[0]  # the rest tells where in the graph
        raise CalibrationError(f"{name} does not run through the captured graph: {reason}") from error
