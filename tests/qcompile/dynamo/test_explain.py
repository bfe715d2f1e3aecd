"""qcompile.explain: which graphs it finds for what, and what it says of them."""

from __future__ import annotations

import gc
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.errors import CompileError
from tests.qcompile.dynamo.support import DYNAMIC, WEIGHT_ONLY, Mlp, compiled

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """A layer that the recipe leaves out, and one whose width no block divides."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 20)
        self.lm_head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(torch.relu(self.layer(x)))


def test_by_compiled_by_module_by_function_and_all() -> None:
    model = Mlp()
    run = compiled(model)
    run(X)
    by_compiled, by_module, all_graphs = qcompile.explain(run), qcompile.explain(model), qcompile.explain()
    assert by_compiled == by_module == all_graphs
    assert by_compiled.quantized == {"up": "fp8_weight_only", "down": "fp8_weight_only"}


def test_by_function() -> None:
    model, other = Mlp(), Mlp()

    def step(x: Tensor) -> Tensor:
        return torch.tanh(model(x))

    run = compiled(step)
    run(X)
    compiled(other)(X)
    assert len(qcompile.explain(run).graphs) == len(qcompile.explain(step).graphs) == 1
    assert len(qcompile.explain().graphs) == 2


def test_by_method() -> None:
    class Model(Mlp):
        def encode(self, x: Tensor) -> Tensor:
            return self.up(x)

    model = Model()
    run = compiled(model.encode)
    run(X)
    assert list(qcompile.explain(run).quantized.values()) == ["fp8_weight_only"]
    assert len(qcompile.explain(model.encode).graphs) == 1


def test_a_module_compiled_in_place() -> None:
    model = Mlp()
    model.compile(backend="qcompile", options={"recipe": WEIGHT_ONLY, "target": "eager"})
    model(X)
    assert len(qcompile.explain(model).quantized) == 2


def test_a_second_module_of_the_class_is_found() -> None:
    first, second = Mlp(), Mlp()
    run_first, run_second = compiled(first), compiled(second)
    run_first(X)
    with pytest.raises(CompileError, match="call it once first"):
        qcompile.explain(run_second)
    run_second(X)
    assert qcompile.explain(run_second).quantized == qcompile.explain(run_first).quantized


def test_weights_that_were_all_replaced_are_found() -> None:
    model = Mlp()
    run = compiled(model)
    run(X)
    model.load_state_dict(Mlp().state_dict(), assign=True)
    run(X)
    assert len(qcompile.explain(run).quantized) == 2


def test_nothing_compiled_is_an_error() -> None:
    with pytest.raises(CompileError, match="nothing was compiled by backend='qcompile'"):
        qcompile.explain()
    with pytest.raises(CompileError, match="call it once first"):
        qcompile.explain(compiled(Mlp()))
    inductor = torch.compile(Mlp(), backend="eager")
    inductor(X)
    with pytest.raises(CompileError):
        qcompile.explain(inductor)


def test_what_is_no_model_is_an_error() -> None:
    compiled(Mlp())(X)
    for thing in (3, "model", torch.compile):
        with pytest.raises((CompileError, TypeError)):
            qcompile.explain(thing)  # type: ignore[arg-type]


def test_two_graphs_after_a_break() -> None:
    class Breaks(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            torch._dynamo.graph_break()
            return self.down(torch.relu(h))

    run = compiled(Breaks(), fullgraph=False)
    run(X)
    explained = qcompile.explain(run)
    assert [set(graph.quantized) for graph in explained.graphs] == [{"up"}, {"down"}]
    assert set(explained.quantized) == {"up", "down"}


def test_graphs_of_dead_models_disappear() -> None:
    model = Mlp()
    run = compiled(model)
    run(X)
    assert qcompile.explain().graphs
    del model, run
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(CompileError):
        qcompile.explain()


def test_reports_say_what_was_left_and_why() -> None:
    run = compiled(Mixed(), DYNAMIC)
    run(X)
    (graph,) = qcompile.explain(run).graphs
    assert set(graph.quantized) == {"layer"}
    assert set(graph.unquantized) == {"lm_head"}
    assert graph.coverage["linear"] == (1, 2)
    assert (graph.recipe, graph.target, graph.device) == (DYNAMIC, "eager", "cpu")
    assert graph.seconds["passes"] > 0
    codes, scales, rest = 20 * 16, 20 * 4, 4 * (20 + 4 * 20 + 4)
    assert graph.weight_bytes == codes + scales + rest


def test_an_attention_that_no_pass_understands_is_counted() -> None:
    class Renormalized(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            weights = (x @ x.mT).softmax(-1) * x.mean(-1)[:, None]
            return super().forward((weights / weights.sum(-1, keepdim=True)) @ x)

    run = compiled(Renormalized())
    run(X.expand(2, 3, 16))
    found = qcompile.explain(run)
    assert found.unquantized == {"": "attention"}
    assert found.graphs[0].coverage == {"linear": (2, 2), "attention": (0, 1)}
    assert "changed before they meet the value" in found.declined[0].reason


def test_json_is_the_same_as_data() -> None:
    run = compiled(Mixed(), "nvfp4_weight_only")
    run(X)
    explained = qcompile.explain(run)
    whole: dict[str, Any] = json.loads(explained.to_json())
    read = whole["graphs"]
    assert whole["left"] == explained.left == {}
    assert [set(graph["quantized"]) for graph in read] == [set(graph.quantized) for graph in explained.graphs]
    assert [graph["declined"] for graph in read] == [
        [{"pass_name": d.pass_name, "reason": d.reason, "module": d.module, "nodes": list(d.nodes)} for d in g.declined]
        for g in explained.graphs
    ]


def test_printed_tables() -> None:
    run = compiled(Mixed(), DYNAMIC)
    run(X)
    text = str(qcompile.explain(run))
    assert f"Graph 0: recipe {DYNAMIC}, target eager, cpu" in text
    assert "linear, quantized" in text and "1 of 2" in text
    assert "Not quantized" in text and "lm_head" in text
    assert max(map(len, text.splitlines())) <= 120


def test_kernels_of_inductor_are_named() -> None:
    run = compiled(Mlp(), target="inductor")
    with torch.no_grad():
        run(X)
    (graph,) = qcompile.explain(run).graphs
    assert set(graph.kernels) <= {"up", "down"}
    assert graph.seconds["inductor"] > 0


def test_a_model_in_floating_point_is_explained_too() -> None:
    run = compiled(Mlp(), None)
    run(X)
    (graph,) = qcompile.explain(run).graphs
    assert graph.quantized == {} and graph.recipe == ""
    assert graph.coverage["linear"] == (0, 2)


def test_dropped_layers_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device has no kernel for runs in the model's precision, and the printed text says so."""
    from passes.lower.device import Device
    from qcompile.dynamo import backend

    monkeypatch.setattr(backend, "_device", lambda _: Device("cuda", (7, 5)))
    run = compiled(Mlp(), DYNAMIC, target="inductor")
    with torch.no_grad():
        run(X)
    explained = qcompile.explain(run)
    assert set(explained.graphs[0].dropped) == {"up", "down"}
    text = str(explained)
    assert "In the model's own precision (2)" in text
    for layer, why in explained.graphs[0].dropped.items():
        assert [layer, *why.split()] in [line.split() for line in text.splitlines()]
