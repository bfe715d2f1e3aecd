"""Kernels that convolutions on codes add, by the neighbors, as layer lists of TensorRT-RTX 1.7.1 have them."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from passes.added_kernels import AddedKernels, OnCodes
from passes.graph import aten, calls, module_path
from passes.testing import graph_of

C = 8


class Block(nn.Module):
    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
        self.skip = nn.Conv2d(C, C, 1) if skip else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.skip(x))


class Net(nn.Module):
    """A convolution, two residual blocks, the first with a convolution in its skip branch, a norm and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, C, 1), Block(True), Block(False)
        self.norm, self.last = nn.GroupNorm(2, C), nn.Conv2d(C, C, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(torch.relu(self.stem(x))))
        return self.last(nn.functional.silu(self.norm(x))).mean((2, 3))


@cache
def net() -> GraphModule:
    return graph_of(Net(), torch.randn(1, 3, 9, 9), normalized=True)


def added(names: Collection[str], per_channel: bool) -> AddedKernels:
    found = {module_path(call): call for call in calls(net().graph, aten.convolution.default)}
    return AddedKernels({found[name]: OnCodes("int8", per_channel) for name in names})


@pytest.mark.parametrize(
    ("names", "per_channel", "one_scale"),
    [
        (["a.first"], 2, 1),  # the kernel of its codes, and that which scales
        (["stem", "a.first"], 3, 2),  # a chain shares the one between
        (["a.second"], 2, 1),  # the skip branch, in half precision, adds what it wrote
        (["a.second", "a.skip"], 3, 3),  # both are added in one
        (["a.first", "a.second", "a.skip"], 3, 3),  # and read by two
        (["b.second"], 1, 1),  # its sum is read by the norm alone
        (["b.first", "b.second"], 2, 2),
        (["last"], 0, 0),  # between kernels that are there anyway
        (["a.first", "a.second", "a.skip", "b.first", "b.second", "last"], 4, 4),
    ],
)
def test_kernels_are_counted_by_neighbors(names: list[str], per_channel: int, one_scale: int) -> None:
    for number, per in ((per_channel, True), (one_scale, False)):
        kernels = added(names, per)
        assert len(kernels.of(kernels.chosen)) == number, per


def test_runs_are_those_that_share_a_kernel() -> None:
    runs = added(["stem", "a.first", "a.skip", "b.second", "last"], True).runs()
    assert sorted(sorted(map(module_path, run)) for run in runs) == [
        ["a.first", "a.skip", "stem"],
        ["b.second"],
        ["last"],
    ]
