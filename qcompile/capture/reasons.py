"""What torch.export says of a model that it cannot capture, in a few lines and with the way out."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qcompile.messages import some

_LINES, _CHARACTERS = 4, 600
# From here on torch prints graphs and stacks, or says how to print more of them.
_TAIL = re.compile(
    r"For more information, run with|For extended logs|If you suspect the guard|For more debugging help|For C\+\+ stack"
    r"|The error above occurred when|While executing %|Original traceback:|Use tlparse|GraphModule: class"
    r"|class GraphModule|def forward\(|Framework stack|User Stack|Caused by: \(|consider using data-dependent friendly"
)
_PLACE = re.compile(r'The following call raised this error:\s+File "(?P<file>[^"]+)", line (?P<line>\d+)')

_WAYS_OUT = (
    (
        r"data-dependent|GuardOnDataDependent",
        "the model decides by the value of a tensor: write it with torch.where, or mark a size with torch._check",
    ),
    (
        r"_base\.size|_base\.stride|has no attribute 'size'",
        "it was exported with an example input that is a view, and checks the tensor behind it: export again with"
        " x.clone()",
    ),
    (r"\.numpy\(\) is not supported", "leave NumPy out of forward"),
    (
        r"Tensor dtype mismatch",
        "a part in autocast changes its dtype: give qcompile the module, or export it with strict=False",
    ),
)
_SPECIALIZED = re.compile(r"You marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)")
_CACHES = (
    "; the model runs with a key/value cache, which is state that it writes to: capture it without (use_cache=False, no"
    " past_key_values, no StaticCache in the module)"
)


def reason(error: Exception, model: torch.nn.Module | ExportedProgram, inputs: Any) -> str:
    """The sentence of `error` that says what is wrong, and what to do about it where that is known.

    Args:
        inputs: the example inputs, where a cache may be.
    """
    text = str(error).strip()
    if (length := _SPECIALIZED.search(text)) and (layers := _recurrent(model)):
        return (
            f"{length[1]} is dynamic, and the model specialized it to {length[2]}: torch.export captures {some(layers)}"
            " for the length of the example alone; leave that axis out of dynamic_shapes, and pad inputs to it (the"
            " batch can be dynamic)"
        )
    place = _PLACE.search(text)
    lines = [line.rstrip() for line in _TAIL.split(text)[0].splitlines() if line.strip()]
    if "Suggested fixes:" in text:
        lines = [line for line in text.splitlines() if line.startswith("  ") or line.startswith("Suggested")]
    found = "\n".join(lines[:_LINES])[:_CHARACTERS].strip() or type(error).__name__
    if place is not None:
        found += f" ({place['file']}:{place['line']})"
    for pattern, way_out in _WAYS_OUT:
        if re.search(pattern, text):
            return f"{found}; {way_out}"
    return found + (_CACHES if has_cache(model, inputs) else "")


def _recurrent(model: torch.nn.Module | ExportedProgram) -> list[str]:
    """Path and kind of each recurrent layer."""
    modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
    return [f"{path} ({type(m).__name__})".lstrip() for path, m in modules if isinstance(m, torch.nn.RNNBase)]


def has_cache(model: torch.nn.Module | ExportedProgram, inputs: Any) -> bool:
    """Whether a key/value cache is among the inputs or the attributes of a module, or a program looks as if it had."""
    leaves = pytree.tree_leaves(inputs, is_leaf=_is_cache)
    if any(map(_is_cache, leaves)):
        return True
    if isinstance(model, ExportedProgram):
        return any("cache" in str(spec.target) for spec in model.graph_signature.input_specs if spec.target)
    return any(_is_cache(value) for module in model.modules() for value in vars(module).values())


def _is_cache(value: object) -> bool:
    """Whether `value` is a cache of transformers, found by the name of its class: nothing is imported for it."""
    return any(base.__name__ == "Cache" and "cache" in base.__module__ for base in type(value).__mro__)


@contextlib.contextmanager
def without_graphs() -> Iterator[None]:
    """Leave out the graph that torch.export prints to stderr where it fails: hundreds of lines for a real model."""
    with contextlib.redirect_stderr(_WithoutGraphs()):
        yield


class _WithoutGraphs:
    """Hands on what is written, but for the code of graphs."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    def write(self, text: str) -> int:
        return len(text) if "def forward(self" in text else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
