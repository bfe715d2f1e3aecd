"""Names of the outputs of models that return objects."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcompile.capture.signature import output_names


class Keyless(OrderedDict[str, Any]):
    """As diffusers registers its outputs: torch can take it apart, but does not know what the parts are called."""


class Pair:
    """Parts without names."""

    def __init__(self, first: Any, second: Any) -> None:
        self.parts = [first, second]


pytree.register_pytree_node(
    Keyless,
    lambda tree: (list(tree.values()), list(tree)),
    lambda values, keys: Keyless(zip(keys, values, strict=True)),
    serialized_type_name="tests.Keyless",
)
pytree.register_pytree_node(
    Pair, lambda pair: (pair.parts, None), lambda parts, _: Pair(*parts), serialized_type_name="tests.Pair"
)


class Model(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x + 1, x + 2)


def names(wrap: Any) -> list[str]:
    return output_names(torch.export.export(Model(wrap), (torch.zeros(2),), strict=False))


def test_outputs_of_a_class_without_keys_are_named_by_what_it_is_made_of() -> None:
    assert names(lambda a, b: Keyless(sample=a, extra=b)) == ["sample", "extra"]


def test_classes_without_keys_nest() -> None:
    assert names(lambda a, b: {"outer": Keyless(inner=[a, b])}) == ["outer_inner_0", "outer_inner_1"]
    assert names(lambda a, b: Keyless(left=Keyless(right=a), other=b)) == ["left_right", "other"]


def test_parts_without_names_are_counted() -> None:
    assert names(lambda a, b: Pair(a, b)) == ["output_0", "output_1"]
