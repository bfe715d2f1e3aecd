"""Does every graph output still depend on every input that it depended on in the source program?"""

from __future__ import annotations

from collections.abc import Mapping

from qcompile.onnx.checks.base import Findings
from qcompile.onnx.view import ModelView, reads

# They read the shape of a tensor, never its values: a mask whose values were baked in may live on in them.
_NO_VALUES = {"Shape", "Size"}


def dependence(view: ModelView, *, through_shapes: bool = False) -> dict[str, set[str]]:
    """Graph output -> the graph inputs whose values (or, on request, whose shapes) can change it."""
    found: dict[str, frozenset[str]] = {name: frozenset([name]) for name in view.user_inputs}
    nothing: frozenset[str] = frozenset()
    for node in view.flat.graph.node:
        if node.op_type in _NO_VALUES and not through_shapes:
            continue
        names = node.input[:1] if node.op_type == "CastLike" else list(reads(node))
        sets = {found[name] for name in names if name in found}
        merged = next(iter(sets)) if len(sets) == 1 else nothing.union(*sets)
        found.update((output, merged) for output in node.output if output)
    return {value.name: set(found.get(value.name, nothing)) for value in view.flat.graph.output}


def input_dependence(view: ModelView) -> Findings:
    """A constant folded too far (a calibration batch's mask, its length) leaves an output that ignores an input.

    With the source program's dependence: each output must keep all of its own. Without: no output is constant, and no
    input is dead. Functions are looked into, so that an unused function input counts as unused.
    """
    expected = view.reference_dependence
    problems = _against(expected, dependence(view)) if expected is not None else _alone(view)
    against = "the source program" if expected is not None else "none given"
    return Findings(
        problems, f"{len(view.user_inputs)} inputs, {len(view.model.graph.output)} outputs; against: {against}"
    )


def _against(expected: Mapping[str, set[str]], found: Mapping[str, set[str]]) -> list[str]:
    problems = [f"output '{name}' of the source program is not in the file" for name in expected if name not in found]
    for name, inputs in expected.items():
        if lost := sorted(set(inputs) - found.get(name, set(inputs))):
            problems.append(f"output '{name}' no longer depends on input {', '.join(map(repr, lost))}")
    return problems


def _alone(view: ModelView) -> list[str]:
    found = dependence(view, through_shapes=True)
    problems = [f"output '{name}' depends on no input" for name, inputs in found.items() if not inputs]
    used = set().union(*found.values())
    return problems + [f"input '{name}' changes no output" for name in view.user_inputs if name not in used]
