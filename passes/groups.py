"""Which linear layers belong together: q, k and v of an attention, gate and up of a feed-forward layer.

They read one tensor and are parts of one module, so that back ends run them as one GEMM, and those with one (global)
scale share it. A graph says it by its edges. Where there is none, as in a directory of weights, the layers' names do;
what one answers and not the other is in `tests/passes/test_groups.py`, over models of many families.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from torch.fx import Node

from passes.quantize.sites import linear_name

__all__ = ["SERVED_AS_ONE", "expert_container", "parallel", "parent_of", "reads", "served_with", "siblings"]

Layer = TypeVar("Layer")

SERVED_AS_ONE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""What vLLM and SGLang merge (their `packed_modules_mapping`), by the last part of the name."""

_READ_ONE_TENSOR = (
    *SERVED_AS_ONE,
    ("q", "k", "v"),
    ("wi_0", "wi_1"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)
_SERVED = {name: group for group in SERVED_AS_ONE for name in group}
_FIRST = {name: group[0] for group in _READ_ONE_TENSOR for name in group}
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.")


def parent_of(name: str) -> str:
    """Path of the module that holds the layer called `name`."""
    return name.rpartition(".")[0]


def reads(linear: Node, *likeness: object) -> tuple[object, ...]:
    """What the linear layers of a group have in common in a graph: the tensor, the module, and `likeness`."""
    return (linear.args[0], parent_of(linear_name(linear)), *likeness)


def siblings(name: str, *likeness: object) -> tuple[object, ...]:
    """The same where there is no graph, by the name of a layer."""
    parent, _, last = name.rpartition(".")
    return (parent, _FIRST.get(last, last), *likeness)


def parallel(layers: Iterable[Layer], key: Callable[[Layer], Hashable]) -> list[list[Layer]]:
    """`layers` by `key`, one of the two above, in the order of the first of each group."""
    groups: dict[Hashable, list[Layer]] = defaultdict(list)
    for layer in layers:
        groups[key(layer)].append(layer)
    return list(groups.values())


def served_with(name: str) -> tuple[str, ...]:
    """Last parts of the names that servers load the layer called `name` together with, itself among them; () if none.

    The experts of a mixture, which they load together, too, have one `expert_container`.
    """
    return _SERVED.get(name.rpartition(".")[2], ())


def expert_container(name: str) -> str | None:
    """`model.layers.0.mlp.experts.3.up_proj` -> `model.layers.0.mlp.experts`; None for another layer."""
    match = _EXPERT.match(name)
    return match[1] if match else None
