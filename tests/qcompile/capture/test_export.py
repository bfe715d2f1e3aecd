"""Capture: what comes back, and that the user's model and program stay as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from passes.carried import state_names
from passes.graph import aten, calls
from qcompile.capture import capture
from qcompile.errors import CaptureError

X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)


class Net(nn.Module):
    """Linear, batch norm, dropout and attention: all that behaves or captures differently in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> dict[str, Any]:
        y = self.dropout(self.norm(self.linear(x)))
        y = self.frozen(y if scale is None else y * scale)
        return {"y": y, "pair": (y + 1, y)}


def state_of(model: nn.Module) -> tuple[Any, ...]:
    modes = {name: module.training for name, module in model.named_modules()}
    tensors = model.state_dict(keep_vars=True)
    return modes, {name: (id(t), t._version, t.clone(), t.requires_grad) for name, t in tensors.items()}


def assert_same_state(model: nn.Module, before: tuple[Any, ...]) -> None:
    modes, tensors = state_of(model)
    assert modes == before[0]
    assert tensors.keys() == before[1].keys()
    for name, (identity, version, value, requires_grad) in tensors.items():
        old = before[1][name]
        assert (identity, version, requires_grad) == (old[0], old[1], old[3]), name
        assert torch.equal(value, old[2]), name


def test_captures_inference_and_leaves_a_model_in_mixed_modes_as_it_was() -> None:
    model = Net().train()
    model.dropout.eval()
    before = state_of(model)
    program = capture(model, (X,))
    assert_same_state(model, before)
    assert not list(calls(program.graph, aten.dropout.default))
    expected = model.eval()(X)
    found = program.module()(X)
    assert found.keys() == expected.keys() and isinstance(found["pair"], tuple)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [torch.tensor(2.0), None])
def test_args_and_kwargs_or_kwargs_alone(scale: Tensor | None) -> None:
    model = Net().eval()
    for args, kwargs in (((X,), {"scale": scale}), ((), {"scale": scale, "x": X})):
        program = capture(model, args, kwargs)
        torch.testing.assert_close(program.module()(*args, **kwargs), model(*args, **kwargs))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.config = type("Config", (), {"use_cache": True})()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and not self.config.use_cache
        return self.linear(x) if x.sum() > 0 else x


def test_a_failed_capture_says_why_and_restores_the_model() -> None:
    model = Branches().train()
    model.linear.eval()
    before = state_of(model)
    with pytest.raises(CaptureError, match=r"Branches: .*data-dependent"):
        capture(model, (X,))
    assert_same_state(model, before)
    assert model.config.use_cache is True


def test_an_exported_program_is_taken_and_not_changed() -> None:
    batch = Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(Net().eval(), (X,), dynamic_shapes=({0: batch},))
    before = (program.graph_module.code, [n.name for n in program.graph.nodes], program.graph_signature)
    captured = capture(program)
    assert (program.graph_module.code, [n.name for n in program.graph.nodes], program.graph_signature) == before
    assert captured is not program
    assert program.range_constraints.items() <= captured.range_constraints.items()
    three = X[:3]
    torch.testing.assert_close(captured.module()(three), program.module()(three))


@pytest.mark.everyday(2)
@pytest.mark.parametrize("dim", [Dim("batch"), Dim.DYNAMIC, Dim.AUTO])
def test_dynamic_shapes(dim: Any) -> None:
    program = capture(nn.Linear(16, 8), (X,), dynamic_shapes=({0: dim},))
    assert program.module()(torch.randn(7, 16)).shape == (7, 8)
    (size,) = (n.meta["val"].shape[0] for n in program.graph.nodes if n.name == "input")
    assert isinstance(size, torch.SymInt)


def test_what_is_called_wrongly() -> None:
    linear = nn.Linear(16, 8)
    program = torch.export.export(linear, (X,))
    with pytest.raises(CaptureError, match=r"tuple of arguments, not a Tensor: write \(x,\)"):
        capture(linear, X)  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="example inputs"):
        capture(linear)
    with pytest.raises(CaptureError, match="has its own inputs"):
        capture(program, (X,))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.linear(x)


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


@pytest.mark.parametrize(("model", "name"), [(Counter(), "calls"), (InPlace(16, 8), "x")])
def test_what_a_model_writes_to_is_given_back_and_left_alone(model: nn.Module, name: str) -> None:
    x = X.clone()
    program = capture(model, (x,))
    state = {"state": {name: torch.ones(())}} if name == "calls" else {}
    outputs, written = program.module()(x, **state)
    assert torch.equal(written[name], torch.tensor(2.0) if state else 2 * X)
    assert torch.equal(outputs, nn.Linear.forward(model, 2 * X) if not state else model.linear(X))  # type: ignore[operator,arg-type]
    assert torch.equal(x, X) and not any(buffer.any() for buffer in model.buffers())


class Learns(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.bias.mul_(2)
        return super().forward(x)


def test_a_model_that_writes_to_a_weight_is_an_error() -> None:
    with pytest.raises(CaptureError, match=r"writes to bias while it runs, which are parameters: state .* is buffers"):
        capture(Learns(16, 8), (X,))


def test_a_program_captured_in_training_mode_is_an_error() -> None:
    program = torch.export.export(Net().train(), (X,))
    with pytest.raises(CaptureError, match=r"norm \(.*dropout \(.*model\.eval\(\) before torch\.export"):
        capture(program)


def test_hugging_face_decoder_without_knowing_about_the_cache() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    ids = torch.randint(0, 50, (2, 8))
    program = capture(model, (ids,))
    assert model.config.use_cache is True and model.training and model.model.layers[0].mlp.training
    found, expected = program.module()(ids), model.eval()(ids, use_cache=False)
    assert type(found) is type(expected) and found.keys() == expected.keys()
    torch.testing.assert_close(found.logits, expected.logits)


def test_returns_an_exported_program_that_is_functional() -> None:
    program = capture(nn.Sequential(nn.Linear(16, 8), nn.ReLU(inplace=True)), (X,))
    assert isinstance(program, ExportedProgram)
    assert all(not n.target._schema.is_mutable for n in program.graph.nodes if n.op == "call_function")


class Moved(nn.Module):
    """Assigns a table to itself, as CTRL does; or what is another one, then."""

    def __init__(self, another: bool) -> None:
        super().__init__()
        self.layer, self.another = nn.Linear(4, 4), another
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        self.table = self.table.to(x.dtype) + 1 if self.another else self.table.to(x.dtype)
        result: Tensor = self.layer(x) + self.table
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_buffer_that_is_assigned_to_itself_is_not_written(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, dtype=dtype)
    model = Moved(another=False).eval()
    model.layer.to(dtype)
    program = capture(model, (x,))
    assert [spec.kind.name for spec in program.graph_signature.output_specs] == ["USER_OUTPUT"]
    assert torch.equal(program.module()(x), model(x))
    assert state_names(capture(Moved(another=True).eval(), (torch.randn(2, 4),))) == ["table"]
