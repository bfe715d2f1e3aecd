"""Training mode, random operators, and operators with graphs of their own: refused or said, never silent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qcompile
from passes.graph import calls
from passes.ir import QUANTIZE
from qcompile.capture import capture
from qcompile.errors import CaptureError

X = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A linear layer, and behind it `function(self, x)`."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.linear, self.function, self.layer = nn.Linear(16, 16), function, layer or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.linear(x))


def layer(self: Net, x: Tensor) -> Tensor:
    return self.layer(x)


def drawing_attention(self: Net, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)


class DropPath(nn.Module):
    """Stochastic depth as timm writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.9) if self.training else x


class Gru(nn.GRU):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


TRAINED: dict[str, Callable[[], Net]] = {
    "dropout": lambda: Net(layer, nn.Dropout(0.3)),
    "dropout 1d": lambda: Net(layer, nn.Dropout1d(0.3)),
    "alpha dropout": lambda: Net(layer, nn.AlphaDropout(0.3)),
    "rrelu": lambda: Net(layer, nn.RReLU()),
    "batch norm": lambda: Net(layer, nn.BatchNorm1d(8)),
    "gru": lambda: Net(layer, Gru(16, 16, 2, dropout=0.5)),
    "attention": lambda: Net(drawing_attention),
    "drop path": lambda: Net(layer, DropPath()),
}


@pytest.mark.everyday(4)
@pytest.mark.parametrize("name", TRAINED)
def test_a_program_exported_in_training_mode_is_refused(name: str) -> None:
    model = TRAINED[name]()
    with torch.no_grad():
        program = torch.export.export(model.train(), (X,))
    place = "scaled_dot" if name == "attention" else "layer "
    with pytest.raises(CaptureError, match=rf"training mode: .*{place}.*model\.eval\(\) before torch\.export"):
        qcompile.quantize(program, recipe="fp8_per_channel_per_token")


@pytest.mark.parametrize("name", ["batch norm", "gru", "attention"])
def test_in_eval_mode_it_is_captured_in_silence(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = TRAINED[name]().train()
    with caplog.at_level(logging.WARNING, "qcompile"):
        program = capture(model, (X,))
        torch.testing.assert_close(program.module()(X), model.eval()(X))
    assert not caplog.records


def test_a_decomposed_program_in_training_mode_is_refused() -> None:
    program = torch.export.export(TRAINED["dropout"]().train(), (X,)).run_decompositions()
    with pytest.raises(CaptureError, match="native_dropout"):
        capture(program)


def test_batch_statistics_without_running_ones_are_no_training() -> None:
    model = Net(layer, nn.BatchNorm1d(8, track_running_stats=False)).eval()
    program = torch.export.export(model, (X,))
    torch.testing.assert_close(capture(program).module()(X), model(X))


RANDOM = {
    "dropout": lambda self, x: F.dropout(x, 0.3),
    "rand": lambda self, x: x + torch.rand(16),
    "attention": lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_model_that_is_random_in_eval_mode_is_said_to_be(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qcompile"):
        program = capture(Net(RANDOM[name]).eval(), (X,))
    assert "draws random numbers in eval mode, too" in caplog.text and name in caplog.text
    assert not torch.equal(program.module()(X), program.module()(X))


class Written(nn.Module):
    """Attention written out, whose probabilities are always dropped."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout((x @ x.transpose(-1, -2) * 0.25).softmax(-1), 0.5) @ x


def test_dropout_of_a_model_is_not_lost_with_its_attention() -> None:
    model = Net(layer, Written()).eval()
    program = qcompile.quantize(model, (X,), recipe="fp8", calibration=[X], dtype=torch.float32, progress=False)
    assert any(calls(program.graph, QUANTIZE))
    assert not torch.equal(program.module()(X), program.module()(X))
