"""torch.cond, while_loop and scan: what stands around their graphs and in them is quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.export import Dim

import qcompile
from passes import unlift
from passes.ir import QUANTIZE
from passes.subgraphs import all_calls, graphs
from qcompile.errors import ExportError
from qcompile.onnx.view import walk
from qcompile.report.record import record_of

Held = Callable[[nn.Module, Tensor], Tensor]
X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
slow = pytest.mark.slow


class Holder(nn.Module):
    """`after(held(before(x)))`, with a layer `inner` for what is held."""

    def __init__(self, held: Held, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(16, 16), nn.Linear(16, 16)
        self.inner = inner or nn.Linear(16, 16)
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.after(self.held(self.inner, self.before(x)))
        return result


def cond(inner: nn.Module, y: Tensor) -> Tensor:
    result: Tensor = torch.cond(y.sum() > 0, lambda y: inner(y), lambda y: inner(y) * 2, (y,))
    return result


def nested(inner: nn.Module, y: Tensor) -> Tensor:
    def other(y: Tensor) -> Tensor:
        result: Tensor = torch.cond(y.mean() > -100, lambda y: inner(y), lambda y: y * 2, (y,))
        return result

    result: Tensor = torch.cond(y.sum() > 100, lambda y: y.cos(), other, (y,))
    return result


def loop(inner: nn.Module, y: Tensor) -> Tensor:
    result: Tensor = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, inner(y)), (torch.tensor(0), y))[1]
    return result


def steps(inner: nn.Module, y: Tensor) -> Tensor:
    result: Tensor = scan(lambda c, t: (c * 0.5 + t, inner(c + t)), y.new_zeros(16), y, dim=0)[1]
    return result


def loop_of_conds(inner: nn.Module, y: Tensor) -> Tensor:
    def step(i: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, torch.cond(y.sum() > 0, lambda y: inner(y), lambda y: inner(y).relu(), (y,))

    result: Tensor = while_loop(lambda i, y: i < 3, step, (torch.tensor(0), y))[1]
    return result


def inside_and_outside(inner: nn.Module, y: Tensor) -> Tensor:
    return cond(inner, inner(y))


ALL = [cond, *(pytest.param(h, marks=slow) for h in (nested, loop, steps, inside_and_outside))]


def quantized(model: nn.Module, recipe: str = "fp8", **options: object) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    x = X.to(next(model.parameters()).dtype)
    return qcompile.quantize(
        model.eval(),
        (x,),
        recipe=recipe,
        calibration=[(x,), (-x,)],
        progress=False,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("held", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=slow)])
def test_layers_in_a_graph_are_quantized(held: Held, dtype: torch.dtype, tmp_path: Path) -> None:
    """A portable file gives the numbers of the program, which are those of the model."""
    torch.manual_seed(0)
    model = Holder(held).eval().to(dtype)
    program = quantized(model)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    session = qcompile.onnx_session(tmp_path / "m.onnx")
    for x in (X, -X):  # both branches
        with torch.no_grad():
            want, float_result = program.module()(x.to(dtype)), model(x.to(dtype))
        (got,) = session.run(None, {"x": x.to(dtype).numpy()})
        assert np.linalg.norm(got - want.numpy()) < 5e-2 * float(want.norm())  # a code can flip
        assert 0 < (want - float_result).norm() < 0.1 * float_result.norm()
    assert report.quantized == {"before": "fp8", "inner": "fp8", "after": "fp8"}
    assert report.unquantized == {} and report.coverage == {"linear": (3, 3)} and not report.declined
    proto = onnx.load(tmp_path / "m.onnx")
    assert {n.op_type for n in walk(proto.graph)} >= {"QuantizeLinear"} and len(proto.graph.initializer)
    stored = [t.name for t in proto.graph.initializer if t.name.startswith("inner.weight") and len(t.dims) == 2]
    assert stored == ["inner.weight"]  # the codes of both branches are one tensor


@pytest.mark.parametrize("held", [cond])
def test_a_program_is_saved_and_loaded(held: Held, tmp_path: Path) -> None:
    program = quantized(Holder(held))
    torch.export.save(program, tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2")
    assert torch.equal(loaded.module()(X), program.module()(X))
    with pytest.raises(qcompile.QCompileError, match="quantized already"):
        qcompile.quantize(loaded, recipe="fp8", calibration=[(X,)], progress=False)


def test_lift_and_unlift_keep_the_numbers() -> None:
    model = Holder(loop_of_conds).eval()
    program = torch.export.export(model, (X,), strict=False)
    gm = unlift(program)
    assert len(graphs(gm)) == 5
    names = [str(n.target) for part in graphs(gm) for n in part.graph.find_nodes(op="get_attr") if "val" in n.meta]
    assert {"inner.weight", "inner.bias"} <= set(names)
    from passes import lift

    again = lift(gm, program)
    assert set(again.state_dict) == set(program.state_dict)
    assert torch.equal(again.module()(X), model(X))


@pytest.mark.parametrize(
    "recipe", ["int8", *(pytest.param(r, marks=slow) for r in ("nvfp4", "fp8_per_channel_per_token"))]
)
def test_other_formats(recipe: str, tmp_path: Path) -> None:
    program = quantized(Holder(cond), recipe)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target="tensorrt", compare=(X,))
    assert set(report.quantized) == {"before", "inner", "after"}
    assert report.comparison is not None


@pytest.mark.parametrize("target", ["portable", pytest.param("tensorrt", marks=slow)])
def test_layers_are_compared_behind_what_a_graph_captures(target: str, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: Tensor, p: Tensor) -> Tensor:
            y = self.a(x).tanh()  # no part of the condition
            held = torch.cond(p.sum() > 0, lambda y: self.b(y), lambda y: self.b(y) * 2, (y,))
            result: Tensor = self.c(held)
            return result

    batch = X, torch.ones(3)
    program = qcompile.quantize(Model().eval(), batch, recipe="fp8", calibration=[batch], progress=False)
    comparison = qcompile.export_onnx(program, tmp_path / "m.onnx", target=target, compare=batch).comparison  # type: ignore[arg-type]
    assert comparison is not None
    assert {"tanh", "quantize_1", "output"} <= {d.name for d in comparison.differences}
    assert comparison.worst(1)[0].badness < 1e-2


def test_a_branch_that_calibration_never_takes_is_listed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.never = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = torch.cond(x.sum() > 1e6, lambda x: self.never(x), lambda x: self.often(x), (x,))
            return result

    program = quantized(Two())
    gm = unlift(program)
    assert len(list(all_calls(gm, QUANTIZE))) == 1
    assert [d.module for d in record_of(program).declined] == ["never"]


def test_calibration_runs_graphs_with_what_comes_from_outside() -> None:
    """The range of a layer in a loop is the largest over its steps."""
    model = Holder(lambda inner, y: loop(inner, y * 4)).eval()
    seen: list[float] = []
    model.inner.register_forward_pre_hook(lambda _, args: seen.append(float(args[0].detach().abs().max())))
    y = model.before(X) * 4
    for _ in range(3):
        y = model.inner(y)
    del model.inner._forward_pre_hooks
    model.inner._forward_pre_hooks = type(model._forward_pre_hooks)()
    state = qcompile.calibrate(model, (X,), recipe="fp8", calibration=[(X,)], progress=False)
    assert float(state["inner.input_quantizer"]) == pytest.approx(max(seen))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, y: Tensor) -> Tensor:
        q, k, v = (part.view(1, -1, 2, 8).transpose(1, 2) for part in self.qkv(y).split(16, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(y.shape))
        return result


@pytest.mark.slow
def test_an_attention_in_a_branch(tmp_path: Path) -> None:
    program = quantized(Holder(cond, Attention()))
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    assert report.coverage == {"linear": (4, 4), "attention": (1, 1)}
    (got,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": X.numpy()})
    np.testing.assert_allclose(got, program.module()(X).detach().numpy(), rtol=3e-2, atol=3e-2)


@slow
def test_a_dynamic_batch(tmp_path: Path) -> None:
    program = quantized(Holder(cond), dynamic_shapes=({0: Dim("n")},))
    qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    x = torch.cat([X, X[:3]])
    (got,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(got, program.module()(x).detach().numpy(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("held", [cond, pytest.param(loop, marks=slow)])
@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=slow)])
def test_torch_compile(held: Held, target: str) -> None:
    torch._dynamo.reset()
    model = Holder(held).eval().to(torch.float16)
    x = X.half()
    state = qcompile.calibrate(model, (x,), recipe="fp8", calibration=[(x,), (-x,)], progress=False)
    options = {"recipe": "fp8", "calibration": state, "target": target}
    compiled = torch.compile(model, backend="qcompile", options=options)
    program = qcompile.quantize(model, (x,), recipe="fp8", calibration=state, progress=False)
    with torch.no_grad():
        for given in (x, -x):
            torch.testing.assert_close(compiled(given), program.module()(given), rtol=1e-2, atol=1e-2)
    found = qcompile.explain(compiled)
    assert set(found.quantized) == {"before", "inner", "after"} and not found.unquantized


@pytest.mark.parametrize("returned", ["view", *(pytest.param(r, marks=slow) for r in ("input", "twice"))])
def test_what_a_branch_returns_shares_nothing_with_what_it_takes(returned: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            def other(x: Tensor) -> tuple[Tensor, Tensor]:
                y = self.layer(x)
                if returned == "input":
                    return y, x.clone()
                return (y, x.reshape(16, -1).reshape(x.shape).clone()) if returned == "view" else (y, y.clone())

            result: tuple[Tensor, Tensor] = torch.cond(x.sum() > 0, lambda x: (x * 2, x + 1), other, (x,))
            return result

    model = Model().eval()
    program = quantized(model)
    retraced = program.run_decompositions({})  # torch checks it there
    for got, want in zip(retraced.module()(X), program.module()(X), strict=True):
        assert torch.equal(got, want)


@slow
@pytest.mark.parametrize("held", [cond, nested, loop, steps, inside_and_outside])
@pytest.mark.parametrize("recipe", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_engines(held: Held, recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    qcompile.export_onnx(quantized(Holder(held).to(dtype), recipe), tmp_path / "m.onnx", target="tensorrt")
    engine = qcompile.build_engine(tmp_path / "m.onnx", target="sm89", progress=False)
    assert engine.gemms[recipe] >= 3 and engine.gemms["half"] == engine.gemms["float"] == 0


@pytest.mark.slow
def test_a_graph_in_a_loop_runs_and_is_named_by_the_export(tmp_path: Path) -> None:
    program = quantized(model := Holder(loop_of_conds))
    assert len(list(all_calls(unlift(program), QUANTIZE))) == 4
    with torch.no_grad():
        want, got = model(X), program.module()(X)
    assert 0 < (got - want).norm() < 0.1 * want.norm()
    with pytest.raises(ExportError, match=r"torch.onnx writes no cond in a while_loop"):
        qcompile.export_onnx(program, tmp_path / "m.onnx")


def test_what_onnx_has_not_is_named(tmp_path: Path) -> None:
    from torch._higher_order_ops.map import map as torch_map

    program = quantized(Holder(lambda inner, y: torch_map(lambda row: inner(row), y)))
    with pytest.raises(ExportError, match=r"map.*no form in ONNX"):
        qcompile.export_onnx(program, tmp_path / "m.onnx")
