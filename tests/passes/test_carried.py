"""What a program writes to, as inputs and outputs."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from passes.aliases import merge_aliases
from passes.carried import carry_writes, initial_state, state_names
from passes.functional import functional
from passes.program import lift, unlift


class Cached(nn.Module):
    """Keeps what it was given, in buffers of a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("kept", torch.zeros(2, 6))
        self.inner.register_buffer("count", torch.tensor(1), persistent=False)
        self.inner.register_buffer("scale", torch.tensor(3.0))

    def forward(self, x: Tensor, state: float = 1.0) -> Tensor:
        self.inner.kept.index_copy_(1, torch.arange(x.shape[1]) + self.inner.count, x)  # type: ignore[operator]
        self.inner.count.add_(x.shape[1])  # type: ignore[operator]
        return self.inner.kept * self.inner.scale * state


class Holds(nn.Module):
    """Holds its buffers in an object as well, as exports of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(3))
        self.cache = [self.kept]

    def forward(self, x: Tensor) -> Tensor:
        self.cache[0].add_(x)
        return self.cache[0] * 2


class Writes(nn.Module):
    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        cache[:, 1:2] = x
        return cache.sum()


def test_buffers_come_in_and_go_out_as_in_the_module() -> None:
    model, x = Cached(), torch.randn(2, 2)
    program = carry_writes(functional(torch.export.export(model, (x,), {"state": 2.0})))
    assert state_names(program) == ["inner.kept", "inner.count"]
    (name,) = initial_state(program)  # `state` is an argument of the model
    assert name == "state_" and set(program.state_dict) == {"inner.scale"}
    lifted = lift(unlift(program), program)
    saved = io.BytesIO()
    torch.export.save(lifted, saved)
    saved.seek(0)
    for each in (program, lifted, torch.export.load(saved)):
        plain, state = Cached(), initial_state(each)[name]
        for token in torch.randn(2, 2, 2):
            given = {key: tensor.clone() for key, tensor in state.items()}
            outputs, state = each.module()(token, state=2.0, **{name: given})
            assert torch.equal(outputs, plain(token, 2.0))
            assert all(torch.equal(state[key], plain.get_buffer(key)) for key in state)
        assert torch.equal(initial_state(each)[name]["inner.count"], torch.tensor(1))


def test_the_program_that_is_given_stays_as_it_was() -> None:
    before = functional(torch.export.export(Cached(), (torch.randn(2, 2),)))
    code, kinds = before.graph_module.code, [spec.kind for spec in before.graph_signature.output_specs]
    carry_writes(before)
    assert (before.graph_module.code, [s.kind for s in before.graph_signature.output_specs]) == (code, kinds)
    assert "inner.kept" in before.state_dict and "inner.count" in before.constants


def test_an_input_that_is_written_to_goes_out() -> None:
    x, cache = torch.randn(2, 1), torch.randn(2, 3)
    program = carry_writes(functional(torch.export.export(Writes(), (x, cache))))
    kept = cache.clone()
    total, state = program.module()(x, cache)
    assert torch.equal(cache, kept) and initial_state(program) == {}
    assert torch.equal(total, Writes()(x, kept)) and torch.equal(state["cache"], kept)


def test_what_writes_to_nothing_is_the_same_program() -> None:
    program = functional(torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)))
    assert carry_writes(program) is program and merge_aliases(program) is program and state_names(program) == []


@pytest.mark.parametrize("grad", [True, False])
def test_a_constant_that_is_a_buffer_is_that_buffer(grad: bool) -> None:
    x = torch.randn(3, requires_grad=grad)
    exported = torch.export.export(Holds(), (x,), strict=False)
    merged = merge_aliases(exported)
    assert len(merged.graph_signature.input_specs) == len(exported.graph_signature.input_specs) - 1
    program = carry_writes(functional(merged))
    _, state = program.module()(x, state={"kept": torch.ones(3)})
    assert torch.equal(state["kept"], x + 1) and state_names(program) == ["kept"]
