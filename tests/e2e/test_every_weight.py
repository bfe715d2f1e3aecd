"""Everything that multiplies a weight is in a list of the report, by a count that shares nothing with the report.

The model runs as it is, and what torch dispatches is looked at: each operator that torch's own counter of FLOPs knows,
with an operand that is made of parameters alone and another that is made of inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

pytest.importorskip("diffusers", reason="some of the models are diffusers': pip install diffusers")
pytest.importorskip("transformers", reason="some of the models are Hugging Face's: pip install transformers")

from benchmarks.convolution_zoo import MODELS
from benchmarks.models import Example
from benchmarks.stored import parts_of
from benchmarks.zoo import ZOO
from qcompile.report.program import ProgramReport

aten = torch.ops.aten
MULTIPLY = {*flop_registry, aten._grouped_mm, aten._trilinear, aten.mkldnn_rnn_layer, aten.mv, aten.dot}
CHOOSE = {aten.index, aten.index_select, aten.gather}  # of a weight, by what an input says: it is the weight still


class Multiplied(TorchDispatchMode):
    """Collects the names of the parameters that are multiplied with something that depends on the inputs.

    Attributes:
        found: of each product its parameters: several where a weight is computed of them.
    """

    def __init__(self, model: torch.nn.Module, inputs: Any) -> None:
        super().__init__()
        self.found: set[frozenset[str]] = set()
        self.names = {id(p): frozenset([name]) for name, p in model.named_parameters() if p.ndim > 1}
        self.dependent = {id(t) for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)}
        self.kept: list[Any] = []  # an id is one tensor's as long as that lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.kept += [*given, *made]
        depends = any(id(t) in self.dependent for t in given)
        weights = [self.names[id(t)] for t in given if id(t) in self.names]
        if depends and func.overloadpacket in MULTIPLY:
            self.found.update(weights)
        if depends and not (func.overloadpacket in CHOOSE and weights):
            self.dependent.update(map(id, made))
            for tensor in made:
                self.names.pop(id(tensor), None)  # written in place
        elif weights:
            self.names.update(dict.fromkeys(map(id, made), frozenset().union(*weights)))
        return result


def multiplied(example: Example) -> set[frozenset[str]]:
    with torch.no_grad(), Multiplied(example.model, (example.args, example.kwargs)) as seen:
        example.model(*example.args, **example.kwargs)
    assert seen.found
    return seen.found


def unlisted(example: Example, recipe: str) -> list[list[str]]:
    """The names of what is multiplied and in no list of the program's report."""
    report = ProgramReport.of(example.quantized(recipe=recipe))
    listed = {part for path in (*report.quantized, *report.unquantized) for part in parts_of(path)}
    return [sorted(names) for names in multiplied(example) if not any(_places(name) & listed for name in names)]


def _places(name: str) -> set[str]:
    """What reports may call the layer of a parameter: by its own name, or by that of its module."""
    owner, _, leaf = name.partition(".parametrizations.")[0].rpartition(".")
    return {name, owner, f"{owner}.{leaf}", f"{owner}.{leaf}".removesuffix("_weight")}


def examples() -> dict[str, Callable[[], Example]]:
    return {**{model.name: lambda model=model: model.example(dynamic=False) for model in ZOO}, **MODELS}


SMALL = ("regnet",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in examples()]
)
def test_what_multiplies_a_weight_is_listed(name: str) -> None:
    assert unlisted(examples()[name](), "fp8") == []


class Odd(torch.nn.Module):
    """Products that are no layer, a weight that is computed, and one that an input chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = torch.nn.Parameter(torch.randn(16, 16))
        self.chosen = torch.nn.Parameter(torch.randn(4, 16, 16))
        self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 16))
        self.unused = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x = torch.einsum("bsi,ij->bsj", x, self.mixed) @ self.chosen[ids]
        result: torch.Tensor = self.normed(x)
        return result


def test_the_count_sees_through_views_choices_and_computed_weights() -> None:
    args = torch.randn(2, 3, 16), torch.tensor([1, 3])
    example = Example(Odd().eval(), args, {}, [args])
    normed = frozenset(f"normed.parametrizations.weight.original{index}" for index in (0, 1))
    assert multiplied(example) == {frozenset(["mixed"]), frozenset(["chosen"]), normed}
