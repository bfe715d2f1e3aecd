"""What Dynamo leaves to Python: said once in the log, listed by explain, and an error where a user expects more."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame

import qcompile
from qcompile.dynamo.calls import Region, current_call
from qcompile.errors import ExpectationError
from tests.qcompile.dynamo.support import (
    DYNAMIC,
    WEIGHT_ONLY,
    Mlp,
    assert_current,
    assert_same,
    compiled,
    rounded_copy,
)

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))


class Stop(nn.Module):
    """A loop that data ends: Dynamo gives up on the whole function."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers or [nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.sum() > 1e9:
                break
        return x


class Disabled(nn.Module):
    """A submodule that is not to be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 16), Mlp(), nn.Linear(16, 16)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def between(self, x: Tensor) -> Tensor:
        return self.middle(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))  # type: ignore[no-any-return]


class Heads(Mlp):
    """One layer that `encode` does not call."""

    def encode(self, x: Tensor) -> Tensor:
        return self.up(x)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.no_grad():
        yield


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the back end warned of."""
    found = [r for r in caplog.records if r.name == "qcompile" and r.levelno == logging.WARNING]
    return [record.getMessage() for record in found]


def test_a_function_that_dynamo_gives_up_on(caplog: pytest.LogCaptureFixture) -> None:
    model = Stop()
    run = compiled(model, fullgraph=False)
    for _ in range(3):
        assert_same(run(X), model(X))
    (said,) = warnings(caplog)
    assert said.startswith("2 of 2 layers of Stop ran outside of the graphs that qcompile compiled")
    assert "layers.0, layers.1" in said and "Data-dependent branching" in said
    assert "Stop.forward" in said or not hasattr(eval_frame, "get_skip_reasons"), "torch 2.11 does not tell functions"
    explained = qcompile.explain(run)
    assert explained.graphs == [] and explained.quantized == {}
    assert set(explained.unquantized) == set(explained.left) == {"layers.0", "layers.1"}
    assert "Data-dependent branching" in explained.left["layers.0"]
    assert "In no graph, unquantized (2)" in str(explained)


def test_a_second_module_of_the_class(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo does not try a function again that it gave up on, and has no reason to tell then."""
    for _ in range(2):
        run = compiled(Stop(), fullgraph=False)
        run(X)
    first, second = warnings(caplog)
    assert "Data-dependent branching" in first and first == second
    assert "Data-dependent branching" in qcompile.explain(run).left["layers.1"]


def test_a_disabled_submodule(caplog: pytest.LogCaptureFixture) -> None:
    model = Disabled()
    run = compiled(model, fullgraph=False)
    run(X), run(X)
    (said,) = warnings(caplog)
    assert "2 of 4 layers of Disabled" in said and "middle.up, middle.down" in said and "disable" in said
    explained = qcompile.explain(run)
    assert set(explained.quantized) == {"first", "last"}
    assert set(explained.left) == {"middle.up", "middle.down"}


def test_layers_that_no_call_reached_are_listed_and_no_reason_for_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = Heads()
    run = compiled(model.encode)
    run(X)
    assert warnings(caplog) == []
    assert qcompile.explain(run).left == {"down": "no call reached it, or Dynamo left it alone"}


def test_a_whole_model_in_graphs_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp()
    run = compiled(model, expect={"linear": 2})
    assert_current(run, model, X)
    assert warnings(caplog) == []
    assert qcompile.explain(run).left == {} and qcompile.explain(run).unquantized == {}


def test_expectations_hold_where_the_back_end_is_never_asked() -> None:
    run = compiled(Stop(), fullgraph=False, expect={"linear": 1})
    for _ in range(2):
        with pytest.raises(ExpectationError, match=r"0 of 2 linear are quantized, and 1 are expected; .*layers\.0"):
            run(X)
    run = compiled(lambda x: x + 1, expect={"attention": 1})
    with pytest.raises(ExpectationError, match="0 of 0 attention"):
        run(X)


def test_expectations_are_of_all_graphs_of_a_call_together() -> None:
    model = Disabled()
    assert_same(compiled(model, fullgraph=False, expect={"linear": 2})(X), compiled(model, fullgraph=False)(X))
    with pytest.raises(ExpectationError, match=r"2 of 4 linear are quantized, and 3 are expected; .*middle"):
        compiled(model, fullgraph=False, expect={"linear": 3})(X)
    blocks = compiled(Stop(Mlp(), Mlp(), Mlp()), fullgraph=False, expect={"linear": 6})
    blocks(X)
    names = {f"layers.{i}.{name}" for i in range(3) for name in ("up", "down")}
    assert set(qcompile.explain(blocks).quantized) == names


def test_expectations_from_the_limit_of_recompiles_on(caplog: pytest.LogCaptureFixture) -> None:
    model = Mlp()
    with torch._dynamo.config.patch(recompile_limit=2):
        run = compiled(model, fullgraph=False, dynamic=False)
        strict = compiled(model, fullgraph=False, dynamic=False, expect={"linear": 2})
        for count in (1, 2):
            assert_current(run, model, X[:, :count])
        assert warnings(caplog) == []
        for _ in range(2):
            assert_same(run(torch.randn(5, 3, 16)) * 0, torch.zeros(5, 3, 16))
        (said,) = warnings(caplog)
        assert "2 of 2 layers of Mlp" in said and "recompile limit exceeded" in said
        assert "recompile limit exceeded" in qcompile.explain(run).unquantized["up"]
        assert_current(run, model, X[:, :1])  # what was compiled before goes on
        for _ in range(2):
            with pytest.raises(ExpectationError, match="0 of 2 linear are quantized, and 2 are expected"):
                strict(torch.randn(5, 3, 16))


def test_an_error_of_the_model_is_not_replaced() -> None:
    class Failing(Stop):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError("of the model")

    run = compiled(Failing(), fullgraph=False, expect={"linear": 9})
    with pytest.raises(KeyError, match="of the model"):
        run(X)


def test_a_call_while_another_error_is_handled() -> None:
    try:
        raise KeyError("elsewhere")
    except KeyError:
        with pytest.raises(ExpectationError):
            compiled(Mlp(), expect={"linear": 3})(X)


def test_other_names_for_a_model_and_forced_eager() -> None:
    model = Stop()
    model.compile(backend="qcompile", options={"recipe": WEIGHT_ONLY, "target": "eager", "expect": {"linear": 1}})
    with pytest.raises(ExpectationError):
        model(X)
    run = compiled(lambda m, x: m(x), fullgraph=False, expect={"linear": 1})
    with pytest.raises(ExpectationError, match=r"layers\.0, layers\.1"):
        run(Stop(), X)
    with torch.compiler.set_stance("force_eager"):  # asked for by name
        assert run(Stop(), X).shape == X.shape


def test_a_call_that_dynamo_does_not_end_is_over_with_its_frame() -> None:
    """Dynamo leaves what it entered open where its own clean-up raises."""

    def compiled_function(fn: Any) -> Any:
        def wrapper() -> bool:
            assert fn is None
            Region(None, None)().__enter__()
            return current_call() is not None

        return wrapper

    assert compiled_function(None)()
    assert current_call() is None


def test_other_back_ends_are_left_as_they_were() -> None:
    compiled(Mlp())(X)
    seen: list[Any] = []

    def other(gm: Any, inputs: Any) -> Any:
        seen.append(gm)
        return gm.forward

    run: Any = torch.compile(Recurrent(nn.LSTM), backend=other)
    run(X)
    # Dynamo gives up on the function for others, or breaks at the layer by itself
    assert len(seen) == (2 if torch.__version__ >= (2, 15) else 0)
    assert torch._dynamo.config.allow_rnn is False


class Recurrent(nn.Module):
    """A recurrent layer between linear ones, and a head that every recipe leaves out."""

    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.before = nn.Linear(16, 16)
        self.recurrent = kind(16, 16, batch_first=True, **settings)
        self.after = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.after(self.recurrent(self.before(x))[0]))  # type: ignore[no-any-return]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.lm_head = nn.Linear(16, 16), Recurrent(nn.LSTM), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.inner(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.everyday(1)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_around_a_recurrent_one_are_quantized(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = Recurrent(kind)
    run = compiled(model, fullgraph=False, expect={"linear": 3})
    assert_current(run, model, X)
    model.recurrent.weight_hh_l0 = nn.Parameter(torch.randn_like(model.recurrent.weight_hh_l0))
    model.load_state_dict(Recurrent(kind).state_dict(), assign=True)
    assert_current(run, model, X)
    (said,) = warnings(caplog)
    assert "1 of 4 layers of Recurrent" in said and "recurrent (Dynamo captures no RNN, GRU or LSTM)" in said
    assert qcompile.explain(run).left == {"recurrent": "Dynamo captures no RNN, GRU or LSTM"}
    torch._dynamo.reset()  # forgets who wants to know of compilations
    assert_current(run, model, X)
    assert not hasattr(kind.forward, "_torchdynamo_disable") and not torch._dynamo.config.allow_rnn


def test_rules_are_for_names_in_the_model_behind_a_graph_break() -> None:
    """Dynamo compiles `inner` by itself, and what follows a break reads its module from the stack: a head was
    quantized as `___stack0`, and rules for `inner.*` did nothing."""
    model = Nested()
    recipe = {
        "metadata": {"name": "rules", "description": "All but one layer."},
        "rules": [*WEIGHT_ONLY["rules"], {"quantizer": "*inner.after*", "enable": False}],
    }
    run = compiled(model, recipe, fullgraph=False)
    judge = rounded_copy(model)
    judge.inner.after.weight.data = model.inner.after.weight
    assert_same(run(X), judge(X))
    assert set(qcompile.explain(run).quantized) == {"first", "inner.before", "inner.lm_head", "lm_head"}
    torch._dynamo.reset()
    run = compiled(model, DYNAMIC, fullgraph=False)
    run(X)
    assert set(qcompile.explain(run).quantized) == {"first", "inner.before", "inner.after"}


def test_calibrated_ranges_are_for_names_in_the_model_behind_a_graph_break() -> None:
    class Broken(Stop):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Broken(Mlp(), Mlp())
    state = qcompile.calibrate(model, (X,), recipe="fp8", calibration=[X], progress=False)
    program = qcompile.quantize(model, (X,), recipe="fp8", calibration=state, dtype=torch.float32, progress=False)
    run = compiled(model, "fp8", fullgraph=False, calibration=state)
    assert_same(run(X), program.module()(X))
    model.__class__ = Stop
    run = compiled(model, "fp8", fullgraph=False, calibration=state, expect={"linear": 4})
    assert_same(run(X), program.module()(X))
