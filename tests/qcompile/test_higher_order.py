"""Every operator of torch that takes a function: what it holds is quantized, or listed, or one error names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.out_dtype import out_dtype
from torch._higher_order_ops.strict_mode import strict_mode
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

import qcompile
from qcompile.report.record import record_of
from tests.qcompile.test_subgraphs import Holder, cond, loop, steps

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
ALL = {"before", "inner", "after"}


def torch_print(inner: nn.Module, y: Tensor) -> Tensor:
    torch._higher_order_ops.print("seen")  # type: ignore[attr-defined]
    return inner(y)  # type: ignore[no-any-return]


def attention(inner: nn.Module, y: Tensor) -> Tensor:
    def causal(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(q >= k, score, -float("inf"))

    qkv = inner(y).view(1, 2, 8, 8)
    result: Any = flex_attention(qkv, qkv, qkv, score_mod=causal)
    return result.reshape(8, 16)  # type: ignore[no-any-return]


def autocast(inner: nn.Module, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result: Tensor = inner(y)
    return result.float()


def enabled(inner: nn.Module, y: Tensor) -> Tensor:
    with torch.enable_grad():
        return inner(y)  # type: ignore[no-any-return]


def without(inner: nn.Module, y: Tensor) -> Tensor:
    with torch.no_grad():
        return inner(y)  # type: ignore[no-any-return]


def region(inner: nn.Module, y: Tensor) -> Tensor:
    part = torch.compiler.nested_compile_region(lambda y: inner(y))
    return part(part(y))  # type: ignore[no-any-return]


def product(inner: nn.Module, y: Tensor) -> Tensor:
    codes = (inner(y) * 10).to(torch.int8)
    result: Tensor = out_dtype(torch.ops.aten.mm.default, torch.int32, codes, codes.t()).float() @ y
    return result


def double(inner: nn.Module, y: Tensor) -> Tensor:
    z = inner(y).clone()
    double_in_place(z)
    return z  # type: ignore[no-any-return]


@torch.library.custom_op("qcompile_tests::double", mutates_args={"x"})
def double_in_place(x: Tensor) -> None:
    x.mul_(2)


@dataclass(frozen=True)
class Case:
    """What becomes of a call: the paths of what is quantized, or a pattern of the error; of what is listed as left."""

    held: Callable[[nn.Module, Tensor], Tensor]
    quantized: set[str] | str = frozenset(ALL)  # type: ignore[assignment]
    declined: str = ""
    onnx: str = ""
    compiled: set[str] | str = frozenset(ALL)  # type: ignore[assignment]


LEFT = r"holds graphs of its own, with 1 linear layers"
OUTER = {"before", "after"}
HAS_REGIONS = torch.__version__ >= (2, 12)  # whose calls of one region torch.export writes into the graph
CASES = {
    "cond": Case(cond),
    "while_loop": Case(loop),
    "scan": Case(steps),
    "map": Case(lambda f, y: torch_map(lambda row: f(row), y), OUTER, LEFT, "map_impl has no form in ONNX", OUTER),
    "associative_scan": Case(
        lambda f, y: associative_scan(lambda a, b: a + b, f(y), dim=0, combine_mode="generic"), compiled=r"torch\.vmap"
    ),
    "flex_attention": Case(attention, {*ALL, ""}, compiled=r"torch\.vmap, flex_attention.*compile the module of its"),
    "autocast": Case(autocast),
    "enable_grad": Case(enabled),
    "no_grad": Case(without),
    "checkpoint": Case(lambda f, y: checkpoint(f, y, use_reentrant=False)),  # type: ignore[no-any-return]
    "reentrant checkpoint": Case(lambda f, y: checkpoint(f, y, use_reentrant=True)),  # type: ignore[no-any-return]
    "compiled region": Case(region, ALL if HAS_REGIONS else OUTER, "" if HAS_REGIONS else LEFT, compiled=OUTER),
    "strict_mode": Case(lambda f, y: strict_mode(lambda y: f(y), (y,)), OUTER, LEFT, "strict_mode has no", OUTER),
    "out_dtype": Case(product, onnx=r"out_dtype of aten\.mm\.default has no form in ONNX: write this part with other"),
    "operator in place": Case(double, onnx=r"auto_functionalized\w* of qcompile_tests\.double\.default has no form"),
    "vmap": Case(lambda f, y: torch.vmap(lambda row: f(row))(y), compiled=r"torch\.vmap: the graph of Dynamo cannot"),
    "print": Case(torch_print, r"effects beside its outputs while it runs, by .*print", compiled=r"print.*: the graph"),
}


@pytest.mark.everyday(3)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_program_and_its_file(case: Case, tmp_path: Path) -> None:
    model = Holder(case.held).eval()

    def quantize() -> Any:
        return qcompile.quantize(model, (X,), recipe="fp8", calibration=[(X,), (-X,)], progress=False)

    if isinstance(case.quantized, str):
        with pytest.raises(qcompile.QCompileError, match=case.quantized):
            quantize()
        return
    program = quantize()
    with torch.no_grad():
        want, got = model(X), program.module()(X)
    assert 0 < (got - want).norm() < 0.15 * want.norm()
    declined = [d.reason for d in record_of(program).declined]
    assert bool(declined) == bool(case.declined) and all(re.search(case.declined, reason) for reason in declined)
    if case.onnx:
        with pytest.raises(qcompile.QCompileError, match=case.onnx):
            qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
        return
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    assert set(report.quantized) == case.quantized and bool(report.unquantized) == bool(case.declined)
    (run,) = qcompile.onnx_session(tmp_path / "m.onnx").run(None, {"x": X.numpy()})
    assert (torch.from_numpy(run) - got).norm() < 5e-2 * want.norm()  # a code can flip


@pytest.mark.everyday(3)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiled(case: Case) -> None:
    torch._dynamo.reset()
    model = Holder(case.held).eval()
    options = {"recipe": "fp8_per_channel_per_token", "target": "eager"}
    compiled = torch.compile(model, backend="qcompile", options=options)
    with torch.no_grad():
        want = model(X)
        if isinstance(case.compiled, str):
            with pytest.raises(BackendCompilerFailed, match=case.compiled):
                compiled(X)
            return
        got = compiled(X)
    assert 0 < (got - want).norm() < 0.15 * want.norm()
    assert set(qcompile.explain(compiled).quantized) == case.compiled


@pytest.mark.slow
def test_what_dynamo_cannot_hand_over_is_compiled_as_a_program() -> None:
    """The way out that the error tells."""
    torch._dynamo.reset()
    model = Holder(attention).eval()
    program = qcompile.quantize(model, (X,), recipe="fp8", calibration=[(X,)], dtype=torch.float32, progress=False)
    compiled = torch.compile(program.module(), backend="qcompile", options={"target": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), program.module()(X), rtol=1e-4, atol=1e-4)
    assert len(qcompile.explain(compiled).quantized) == 4


@pytest.mark.slow
def test_a_strict_program_in_autocast_says_how_to_export_it() -> None:
    model = Holder(autocast).eval()
    with pytest.raises(qcompile.QCompileError, match=r"wrap_with_autocast.*export it with strict=False"):
        qcompile.quantize(torch.export.export(model, (X,), strict=True), calibration=[(X,)], progress=False)
    program = torch.export.export(model, (X,), strict=False)
    assert qcompile.quantize(program, calibration=[(X,)], progress=False)
