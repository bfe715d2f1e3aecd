"""Run calibration batches through a captured graph and keep the largest magnitude of chosen tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from passes.graph import shape
from qcompile.errors import CalibrationError


class _Observer(Interpreter):
    """Interprets a graph and records the running amax of some of its nodes."""

    def __init__(self, gm: GraphModule, observed: Iterable[Node]) -> None:
        super().__init__(gm)
        self.amax: dict[Node, torch.Tensor] = {node: torch.zeros(()) for node in observed}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self.amax and result.numel():
            low, high = torch.aminmax(result.detach())
            # torch.maximum carries a NaN on, so one bad value is found at the end
            self.amax[n] = torch.maximum(self.amax[n], torch.maximum(-low, high).float().cpu())
        return result


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
        batches: argument tuples, keyword dicts or single tensors; a batch that is a multiple of the captured batch
            size is run in pieces.

    Returns:
        node -> fp32 scalar.

    Raises:
        CalibrationError: no batch, a batch that does not fit the captured shapes, or NaN or inf in an observed tensor.
    """
    observer, count = _Observer(gm, observed), 0
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    total = len(batches) if isinstance(batches, Sequence) else None
    with Progress(transient=True, disable=not progress) as bar, torch.no_grad():
        task = bar.add_task("calibrating", total=total)
        for batch in batches:
            for inputs in _pieces(flatten_batch(batch, program, count), placeholders, count):
                observer.run(*inputs)
            count += 1
            bar.advance(task)
    if not count:
        raise CalibrationError("the calibration data is empty")
    for node, name in observed.items():
        if not bool(torch.isfinite(observer.amax[node])):
            raise CalibrationError(f"{name}: calibration found {float(observer.amax[node])} in {node.name}")
    return observer.amax


def flatten_batch(batch: Any, program: ExportedProgram, index: int = 0) -> list[Any]:
    """The flat user inputs of `program` for one batch in any of the accepted forms."""
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
    if isinstance(args, torch.Tensor):
        args = (args,)
    example = program.example_inputs
    if example is not None and kwargs:
        kwargs = {name: kwargs[name] for name in example[1] if name in kwargs} | dict(kwargs)
    flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if spec != program.call_spec.in_spec:
        raise CalibrationError(
            f"calibration batch {index} is called as {_describe(args, kwargs)}, but the model was captured as"
            f" {_describe(*example) if example else program.call_spec.in_spec}"
        )
    return flat


def _describe(args: Any, kwargs: Mapping[str, Any]) -> str:
    words = [type(a).__name__ for a in args] + [f"{name}={type(a).__name__}" for name, a in kwargs.items()]
    return f"model({', '.join(words)})"


def _pieces(inputs: list[Any], placeholders: list[Node], index: int) -> Iterator[list[Any]]:
    """`inputs` as they are, or cut along the batch axis if they hold several batches of the captured size."""
    tensors = [(i, t, shape(p)) for i, (t, p) in enumerate(zip(inputs, placeholders, strict=True)) if _is_tensor(t)]
    for _, tensor, captured in tensors:
        same_rank = tensor.ndim == len(captured)
        if not same_rank or any(isinstance(c, int) and c != s for c, s in list(zip(captured, tensor.shape))[1:]):
            raise CalibrationError(
                f"calibration batch {index} holds a tensor of shape {list(tensor.shape)} where the model was captured"
                f" with {[str(c) for c in captured]}; capture with dynamic_shapes, or give batches of that shape"
            )
    ratios = {t.shape[0] // c[0] for _, t, c in tensors if t.ndim and isinstance(c[0], int) and t.shape[0] % c[0] == 0}
    exact = all(t.ndim and isinstance(c[0], int) and t.shape[0] % c[0] == 0 for _, t, c in tensors)
    if ratios in (set(), {1}) or not exact or len(ratios) > 1:
        yield inputs
        return
    for piece in range(ratios.pop()):
        cut = list(inputs)
        for i, tensor, captured in tensors:
            cut[i] = tensor.narrow(0, piece * captured[0], captured[0])
        yield cut


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
