"""An algorithm is asked, and held to what it may answer: what goes wrong in it is an error with its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch.fx import Node

from passes.errors import QCompileError
from passes.places import Pipeline, class_of
from passes.quantize.insert import Quantizer
from qcompile.algorithms.base import Algorithm, Operand, Seen, View
from qcompile.algorithms.scales import has_constant
from qcompile.algorithms.statistics import Statistic
from qcompile.errors import AlgorithmError
from qcompile.messages import first_line, value

__all__ = ["check_groups", "edits", "solve", "watch"]

_Answer = TypeVar("_Answer")


def watch(step: Algorithm[Any], view: View) -> dict[Node, Statistic]:
    """What `step` wants to be kept of which tensors. Raises AlgorithmError."""
    found = _asked(step, "watch", lambda: step.watch(view))
    if not isinstance(found, Mapping):
        raise _wrong(step, f"watch gives {value(found)}, and not {{operand.node: statistic}}")
    for node, statistic in found.items():
        if not isinstance(node, Node) or not isinstance(statistic, Statistic):
            raise _wrong(step, f"watch gives {value(node)}: {value(statistic)}, and not a node and a statistic of it")
    return dict(found)


def edits(step: Algorithm[Any], view: View, seen: Seen) -> Pipeline:
    """The passes that `step` changes the graph by. Raises AlgorithmError."""
    found = _asked(step, "edits", lambda: step.edits(view, seen))
    if not isinstance(found, tuple):
        raise _wrong(step, f"edits gives {value(found)}, and not a Pipeline of passes")
    for make in found:
        class_of(make)
    return Pipeline(*found)


def solve(step: Algorithm[Any], view: View, seen: Seen) -> dict[Operand, Quantizer]:
    """What `step` chose, each of a form that the recipe's rule for it has. Raises AlgorithmError."""
    found = _asked(step, "solve", lambda: step.solve(view, seen))
    if not isinstance(found, Mapping):
        raise _wrong(step, f"solve gives {value(found)}, and not {{operand: quantizer}}")
    known, checked = set(view.operands), {}
    for operand, quantizer in found.items():
        if operand not in known:
            raise _wrong(step, f"solve gives {value(operand)} a quantizer, which is no operand of the view")
        if not isinstance(quantizer, Quantizer):
            raise _wrong(step, f"solve gives {operand.name} {value(quantizer)}, and not a Quantizer")
        if problem := next(_problems(operand, quantizer), None):
            raise _wrong(step, f"{operand.name}: {problem}")
        scale = quantizer.scale
        one = scale is not None and scale.numel() == 1 and not operand.per_channel
        checked[operand] = replace(quantizer, scale=scale.reshape(())) if one and scale is not None else quantizer
    return checked


def check_groups(view: View, quantizers: Mapping[Operand, Quantizer]) -> None:
    """Raise AlgorithmError where weights that have to share a scale got several."""
    for group in view.groups:
        scales = [(m, q.scale) for m in group if (q := quantizers.get(m)) is not None and q.scale is not None]
        for (first, one), (member, other) in pairwise(scales):
            if not torch.equal(one.cpu(), other.cpu()):
                raise AlgorithmError(
                    f"calibration gives {first.name} and {member.name} different scales, {float(one):.4g} and"
                    f" {float(other):.4g}: they read one tensor, and servers merge them, so they share one;"
                    " `view.group(weight)` has all of them"
                )


def _problems(operand: Operand, quantizer: Quantizer) -> Iterator[str]:
    """What of `quantizer` is not of the form that the recipe says, a sentence each."""
    fmt, scale = operand.format, quantizer.scale
    if quantizer.format != fmt:
        yield f"it is given {quantizer.format.name}, and the recipe says {fmt.name}"
        return
    if has_constant(operand.config):
        if not isinstance(scale, torch.Tensor):
            yield f"its scale is {value(scale)}, and not a tensor"
            return
        if not bool((scale.isfinite() & (scale > 0)).all()):
            yield f"its scale holds {float(scale.min()):.3g} to {float(scale.max()):.3g}: scales are positive"
        wanted = operand.scale_shape
        if tuple(scale.shape) != wanted and not (wanted == () and scale.numel() == 1):
            yield f"its scale is {list(scale.shape)}, and {operand.config.granularity} wants {list(wanted)}"
    elif scale is not None:
        yield "it is given a scale, and those of its blocks are all that it has"
    if operand.kind != "weight" and (quantizer.codes is not None or quantizer.block_scales is not None):
        yield "codes and scales of blocks are for weights; those of an activation are found when it is there"
        return
    yield from _misshapen("codes", quantizer.codes, fmt.storage, operand.codes_shape)
    if fmt.sizes:
        stored = fmt.scale.storage if fmt.scale is not None else torch.float32
        yield from _misshapen("block_scales", quantizer.block_scales, stored, operand.blocks_shape)
    elif quantizer.block_scales is not None:
        yield f"it is given scales of blocks, and {fmt.name} has none"


def _misshapen(name: str, given: torch.Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Iterator[str]:
    if given is not None and (given.dtype, tuple(given.shape)) != (dtype, shape):
        yield f"its {name} are {given.dtype} {list(given.shape)}, and have to be {dtype} {list(shape)}"


def _asked(step: Algorithm[Any], method: str, call: Callable[[], _Answer]) -> _Answer:
    try:
        return call()
    except QCompileError:  # raised on purpose: its sentence says what is wrong
        raise
    except Exception as error:  # a fault of the algorithm, wherever it shows
        raise _wrong(step, f"{method} failed with {first_line(error)}") from error


def _wrong(step: Algorithm[Any], what: str) -> AlgorithmError:
    return AlgorithmError(f"the algorithm {step.settings.algorithm}: {what}")
