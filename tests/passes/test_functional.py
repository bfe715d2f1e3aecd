"""A program made functional in place is what `run_decompositions({})` makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from passes.functional import functional

X = torch.randn(2, 6, 8)


def written(x: Tensor) -> Tensor:
    """In place, over tensors that nobody else has, with readers before and after."""
    y = torch.relu(x)
    total = y.sum()
    y += 1
    y.mul_(total)
    values, _ = torch.topk(y, 3)
    values /= values.sum(-1, keepdim=True)
    return y.sum(-1, keepdim=True) + values


def shaped(x: Tensor) -> Tensor:
    """Views, copies or nothing, as the shapes are."""
    a, b = x.transpose(1, 2).reshape(x.shape[0], -1).float().chunk(2, -1)
    y = torch.unflatten(x.flatten(1).to(torch.float64), 1, (6, 8)).contiguous().mT.contiguous()
    return torch.cat([a, b], -1).sum(-1) + y.reshape(x.shape[0], -1).sum(-1)


def constants(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 2.0])[0] + torch.dropout(x, 0.5, False)


def normed(x: Tensor) -> Tensor:
    scale = torch.ones(6)
    return nn.functional.batch_norm(x, scale, scale, scale, scale).relu_()


def over_a_view(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 0] = 2
    return y


def over_what_a_view_reads(x: Tensor) -> Tensor:
    y = x + 1
    first = y[:, 0]
    y *= 2
    return first + y.sum()


def cast(x: Tensor) -> Tensor:
    y = x.half()
    y += torch.ones(8)
    return y


LOCAL = [written, shaped, constants, normed]
WHOLE = [cast, over_a_view, over_what_a_view_reads]


def rows(program: ExportedProgram) -> list[Any]:
    """The graph without the names of nodes, nor computed sizes, of which one for each suffices."""
    of = {spec.arg.name: str(spec.target or spec.arg.name) for spec in program.graph_signature.input_specs}
    names: dict[Node, str] = {}
    found: list[Any] = []
    for node in program.graph.nodes:
        value = pytree.tree_map(_said, node.meta.get("val"))
        if isinstance(node.meta.get("val"), torch.SymInt) or node.op == "placeholder":
            names[node] = str(value) if node.op != "placeholder" else of[node.name]
            continue
        names[node] = f"%{len(found)}"
        args = str(map_arg((node.args, node.kwargs), names.__getitem__))
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        found.append((str(node.target), args.replace("'", ""), str(value), stack))
    return found


def _said(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return str(value)
    return [*map(str, value.shape)], [*map(str, value.stride())], value.dtype


class Holder(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call, self.linear = call, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.call(x).float().sum() + x)
        return result


@pytest.mark.parametrize("dynamic", [None, {0: Dim.DYNAMIC}], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("call", [*LOCAL, *WHOLE], ids=lambda call: call.__name__)
def test_it_is_what_tracing_anew_gives(
    call: Callable[[Tensor], Tensor], dynamic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        program = torch.export.export(Holder(call), (X,), dynamic_shapes={"x": dynamic}, strict=False)
        want = program.run_decompositions({})
        if call in LOCAL:
            monkeypatch.setattr(ExportedProgram, "run_decompositions", None)
        found = functional(program)
    assert rows(found) == rows(want)
    assert found.dialect == want.dialect == "ATEN"
    torch.testing.assert_close(found.module()(X), want.module()(X))
