"""Run calibration batches through a captured graph and keep statistics of chosen tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from passes.graph import ancestors, aten, place_of, val
from passes.subgraphs import held, is_worked_on, subgraph_calls
from qcompile.algorithms.growth import RangeLog
from qcompile.algorithms.share import WHOLE, Share
from qcompile.algorithms.statistics import Statistic
from qcompile.capture.batch_notices import BatchLog
from qcompile.capture.batches import PlacedBatches, batch_count, flatten_batch, kind_of, pieces
from qcompile.errors import AlgorithmError, CalibrationError
from qcompile.messages import first_line, some
from qcompile.progress import progress_bar

_HALF = (torch.float16, torch.bfloat16)
# Operators that take rows of a table: to widen the table would take twice its memory for nothing.
_LOOKUPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default)


class _Observer(Interpreter):
    """Interprets a graph and updates the statistics of some of its nodes.

    What no observed node depends on, such as a language model's head, is not run. With `widen` it computes a
    half-precision graph in float32, as ranges are to be seen that a half would not hold, and few kernels of a CPU know
    half: a ViT takes ten times as long in it. Ranges are then those without the rounding in between.
    """

    def __init__(
        self, gm: GraphModule, statistics: Mapping[Node, Sequence[Statistic]], widen: bool, *, whole: bool = False
    ) -> None:
        """`whole` runs all of `gm`."""
        super().__init__(gm)
        self.statistics, self.widen = statistics, widen
        self.weight = 1.0
        self.parts: dict[str, _Observer] = {}
        observed = {node for node in gm.graph.nodes if node in statistics}
        for call in filter(is_worked_on, subgraph_calls(gm.graph)):
            found = {name: _Observer(part, statistics, widen, whole=True) for name, part in held(gm, call).items()}
            self.parts |= found
            if any(part.observes for part in found.values()):
                observed.add(call)
        self.observes: bool = bool(observed)
        self.needed = set(gm.graph.nodes) if whole else ancestors(observed)

    def weigh(self, weight: float) -> None:
        """Count what is observed from now on `weight` times."""
        self.weight = weight
        for part in self.parts.values():
            part.weigh(weight)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.parts[target].as_captured if target in self.parts else super().get_attr(target, args, kwargs)

    def as_captured(self, *inputs: Any) -> Any:
        """The results for `inputs` in the dtypes that the graph was captured with, as the call around it wants them."""
        nodes = self.graph.output_node().args[0]
        return pytree.tree_map(lambda node, value: _as_captured(value, node), nodes, self.run(*inputs))

    def fetch_args_kwargs_from_env(self, n: Node) -> Any:
        if self.widen and isinstance(n.target, torch._ops.HigherOrderOperator):  # its graphs name the dtypes they have
            return map_arg((n.args, dict(n.kwargs)), lambda operand: _as_captured(self.env[operand], operand))
        return super().fetch_args_kwargs_from_env(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.widen and target not in _LOOKUPS and not isinstance(target, torch._ops.HigherOrderOperator):
            args, kwargs = pytree.tree_map(_widened, (args, kwargs))
            if target is aten._to_copy.default and kwargs == {"dtype": args[0].dtype}:
                return args[0]  # a cast from or to half
        return super().call_function(target, args, kwargs)

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and n not in self.needed:
            return None
        result = super().run_node(n)
        for statistic in self.statistics.get(n, ()):
            args, _ = self.fetch_args_kwargs_from_env(n)
            _update(statistic, n, result, args, self.weight)
        return result


def _update(statistic: Statistic, node: Node, result: Any, args: Any, weight: float) -> None:
    try:
        statistic.update(result, args, weight)
    except Exception as error:  # of the statistic: the data did run
        kind = type(statistic).__name__
        raise AlgorithmError(f"{kind}.update failed at {place_of(node)} with {first_line(error)}") from error


def _as_captured(value: Any, node: Any) -> Any:
    """`value`, widened perhaps, in the dtype that `node` made when it was captured."""
    return value.to(val(node).dtype) if isinstance(value, torch.Tensor) else value


def _widened(argument: Any) -> Any:
    """A half-precision tensor, or the name of a half-precision dtype, as float32."""
    if isinstance(argument, torch.Tensor) and argument.dtype in _HALF:
        return argument.float()
    return torch.float32 if isinstance(argument, torch.dtype) and argument in _HALF else argument


def observe(
    gm: GraphModule,
    program: ExportedProgram,
    statistics: Mapping[Node, Sequence[Statistic]],
    batches: Iterable[Any],
    *,
    widen: bool = False,
    progress: bool = True,
    ranges: RangeLog | None = None,
    share: Share = WHOLE,
) -> BatchLog:
    """Update `statistics` with every batch, or with those of a `share`.

    Args:
        gm: `unlift(program)`, or what passes made of it.
        program: tells how inputs are flattened.
        statistics: what to keep of each of some nodes.
        batches: argument tuples, keyword dicts or single tensors; a batch of another size than the captured one is run
            in pieces of that size.
        widen: compute halves in float32; on a CPU that is always so.
        ranges: is told after each batch that it has been.

    Returns:
        What the batches were like.

    Raises:
        CalibrationError: no batch, or a batch that does not fit what was captured.
    """
    if isinstance(batches, (torch.Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise CalibrationError(f"calibration is a list of batches, not a {kind_of(batches)}; put one batch in a list")
    on_cpu = all(tensor.device.type == "cpu" for tensor in (*gm.parameters(), *gm.buffers()))
    observer = _Observer(gm, statistics, widen or on_cpu)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    log = BatchLog(program, placeholders)
    try:
        _walk(observer, placeholders, log, program, batches, progress, ranges, share)
    except Exception as error:
        share.failed(error)
        raise
    kept = dict.fromkeys(statistic for several in statistics.values() for statistic in several)
    share.join(list(kept), log, ranges)
    return log


def _walk(
    observer: _Observer,
    placeholders: list[Node],
    log: BatchLog,
    program: ExportedProgram,
    batches: Iterable[Any],
    progress: bool,
    ranges: RangeLog | None,
    share: Share,
) -> None:
    """Run the batches of `share`."""
    evenly = any(s.additive for kept in observer.statistics.values() for s in kept)
    total = batch_count(batches)
    own = None if total is None else len(share.numbers(total))
    with progress_bar("calibrating", own, progress) as bar, torch.no_grad():
        for index, batch in share.of(batches):
            name = f"calibration batch {index}"
            if isinstance(batches, PlacedBatches):
                name += f" ({batches.place(index)})"
            flat = flatten_batch(batch, program, name)
            for piece in pieces(flat, placeholders, name, evenly=evenly, program=program):
                observer.weigh(piece.weight)
                _run(observer, piece.inputs, name)
            log.add(flat, name)
            for lost in ranges.add(index + 1, log.samples) if ranges is not None else ():
                lost.lost = name + _nan_inputs(flat, placeholders)
            bar.advance(told=log.counted())
    if not log.batches:
        raise CalibrationError(_no_data(share))


def _no_data(share: Share) -> str:
    if share.count == 1:
        return "the calibration data is empty"
    return f"{share} has no batch of the calibration data: it has fewer than {share.count} of them"


def _nan_inputs(inputs: Sequence[Any], placeholders: Sequence[Node]) -> str:
    """What to say of the NaN in a batch: some models take it for what is missing, so alone it is no error."""
    names = [
        node.name
        for node, value in zip(placeholders, inputs, strict=True)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any())
    ]
    return f", whose {some(names)} {'holds' if len(names) == 1 else 'hold'} NaN" if names else ""


def _run(observer: _Observer, inputs: list[Any], name: str) -> None:
    try:
        observer.run(*inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # what operators say of values they cannot take
        reason = str(error).partition("\n")[0]  # the rest tells where in the graph
        raise CalibrationError(f"{name} does not run through the captured graph: {reason}") from error
