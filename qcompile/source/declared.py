"""Example inputs in the words of the command line: `--input name=shape:dtype`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from passes.graph import val
from qcompile.errors import SourceError
from qcompile.messages import some
from qcompile.remedy import Remedy, meant, with_remedy
from qcompile.source.model import Source

_INPUT = re.compile(r"(?P<name>\w+)=(?P<shape>(\d+(x\d+)*)?):(?P<dtype>\w+)")
_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclasses.dataclass(frozen=True)
class Declared:
    """One input: its name, shape (empty for a scalar) and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.name}={'x'.join(map(str, self.shape))}:{str(self.dtype).removeprefix('torch.')}"

    def made(self, like: Any, random: torch.Generator) -> torch.Tensor:
        """Made-up values: normal floats; integers from the range of an example, which index tables perhaps, zeros
        without one, and ones in a mask."""
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, generator=random).to(self.dtype)
        if "mask" in self.name or self.dtype == torch.bool:
            return torch.ones(self.shape, dtype=self.dtype)
        known = isinstance(like, torch.Tensor) and not like.is_floating_point() and like.numel()
        low, high = (int(like.min()), int(like.max())) if known else (0, 0)
        return torch.randint(low, high + 1, self.shape, generator=random).to(self.dtype)


def parse_inputs(texts: Iterable[str]) -> list[Declared]:
    """Raises SourceError for another form than `name=1x3x224x224:float32`, or a name that is given twice."""
    found: dict[str, Declared] = {}
    for text in texts:
        match = _INPUT.fullmatch(text)
        if match is None or match["dtype"] not in _DTYPES:
            raise SourceError(
                f"--input {text}: write it as name=shape:dtype, such as pixel_values=1x3x224x224:float32; dtypes are"
                f" {', '.join(_DTYPES)}"
            )
        if match["name"] in found:
            raise SourceError(f"--input {text}: the input {match['name']} is given twice")
        shape = tuple(int(size) for size in match["shape"].split("x") if size)
        found[match["name"]] = Declared(match["name"], shape, getattr(torch, match["dtype"]))
    return list(found.values())


def with_inputs(source: Source, declared: Sequence[Declared]) -> Source:
    """`source` with these inputs, which are all that it gets, for examples.

    Raises:
        SourceError: the model takes no such input, needs another one, or a program has others.
    """
    if not declared:
        return source
    if isinstance(source.model, ExportedProgram):
        _check_program(source.model, declared, source.name)
    else:
        _check_signature(source.model, declared, source.name)
    examples, random = source.inputs, torch.Generator().manual_seed(0)
    made = {one.name: one.made(examples.get(one.name), random) for one in declared}
    if isinstance(source.model, ExportedProgram):
        flat = [made[str(name)] for name in source.model.graph_signature.user_inputs]
        args, kwargs = pytree.tree_unflatten(flat, source.model.call_spec.in_spec)
        source.model.example_inputs = (args, kwargs)
        return dataclasses.replace(source, args=args, kwargs=kwargs)
    args, kwargs = _arranged(source, made)
    return dataclasses.replace(source, args=args, kwargs=kwargs)


def inputs_of(program: ExportedProgram) -> list[Declared]:
    """The tensors that a program takes; a dynamic size is the one that it was exported with."""
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    values = {name: val(nodes[name]) for name in map(str, program.graph_signature.user_inputs) if name in nodes}
    return [
        Declared(name, tuple(_size(size) for size in value.shape), value.dtype)
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    ]


def _size(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 2)


def _arranged(source: Source, made: dict[str, torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """By keyword where the source has them so, else by position as far as that goes."""
    assert isinstance(source.model, torch.nn.Module)
    args = []
    for name, parameter in inspect.signature(source.model.forward).parameters.items():
        if source.kwargs or name not in made or parameter.kind is parameter.KEYWORD_ONLY:
            break
        args.append(made.pop(name))
    return tuple(args), made


def _check_program(program: ExportedProgram, declared: Sequence[Declared], name: str) -> None:
    wanted = {one.name: one for one in inputs_of(program)}
    shapes = {node.name: val(node).shape for node in program.graph.find_nodes(op="placeholder") if node.name in wanted}
    fit = {one.name for one in declared if one.name in wanted and _fits(one, shapes[one.name], wanted[one.name].dtype)}
    if fit != wanted.keys() or len(declared) != len(wanted):
        told = tuple(map(str, wanted.values()))
        problem = SourceError(f"{name} was exported for other inputs than the declared ones: --input {' '.join(told)}")
        raise with_remedy(problem, Remedy(options={"--input": told}))


def _fits(one: Declared, shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> bool:
    same = (not isinstance(size, int) or size == given for size, given in zip(shape, one.shape, strict=False))
    return one.dtype == dtype and len(one.shape) == len(shape) and all(same)


def _check_signature(model: torch.nn.Module, declared: Sequence[Declared], name: str) -> None:
    parameters = inspect.signature(model.forward).parameters
    # models of transformers take any keyword and pass it on, to be ignored
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not hasattr(model, "main_input_name")
    taken = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    names = [one.name for one in declared]
    if unknown := [n for n in names if n not in taken and not open_ended]:
        problem = SourceError(f"--input {unknown[0]}: {name} takes no such input; it takes {', '.join(taken)}")
        raise with_remedy(problem, meant(unknown[0], taken))
    if missing := [n for n, p in taken.items() if p.default is p.empty and n not in names]:
        raise SourceError(f"{name} needs {some(missing)}, too: declare every input, with --input NAME=SHAPE:DTYPE")
