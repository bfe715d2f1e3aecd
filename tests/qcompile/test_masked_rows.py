"""Queries from which a mask hides every key: zeros in the program, in files and by torch.compile, and a notice."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qcompile
from qcompile.report.record import record_of

LENGTH, DYNAMIC = 32, "fp8_per_channel_per_token"
SAID = "the mask hides every key from some queries"


def boolean(x: Tensor, mask: Tensor) -> Tensor:
    return mask


def added(value: float | None) -> Any:
    """0 and `value`, finfo.min for None, as models write additive masks themselves."""

    def form(x: Tensor, mask: Tensor) -> Tensor:
        hides = torch.finfo(x.dtype).min if value is None else value
        return torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, hides)

    return form


class Attention(nn.Module):
    """Grouped attention that is returned before its output layer, too, in one of the ways to write a mask."""

    def __init__(self, mask: Any = boolean, eager: float | None = None, causal: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 32)
        self.mask, self.eager, self.causal = mask, eager, causal

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.causal:
            mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if self.eager is not None:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            scores = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~mask, self.eager)
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, self.mask(x, mask), enable_gqa=True)
        mixed = mixed.transpose(1, 2).flatten(2)
        return mixed, self.o(mixed)


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = Attention(**options)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.attn(x, mask)
        return result


MODELS: Mapping[str, Mapping[str, Any]] = {
    "bool": {},
    "inf": {"mask": added(-torch.inf)},
    "min": {"mask": added(None)},
    "1e4": {"mask": added(-1e4)},
    "eager": {"eager": -torch.inf},
    "eager min": {"eager": torch.finfo(torch.float32).min},
    "input": {},  # an additive mask that is an input
}
X = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(0))
MASK = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
MASK |= torch.eye(LENGTH, dtype=torch.bool)
FULL = MASK.clone()  # every query sees a key
MASK[0, 0, 3] = MASK[1, 0, 5] = False
ROWS = ~MASK.any(-1)[:, 0]


def quantize(model: nn.Module, mask: Tensor = MASK, **options: Any) -> ExportedProgram:
    options = {"recipe": "fp8", "calibration": [(X, mask)], "progress": False, **options}
    return qcompile.quantize(model.eval(), (X, mask), **options)


def as_input(kind: str, mask: Tensor) -> Tensor:
    """`mask` as the model of this `kind` takes it."""
    return added(None)(X, mask) if kind == "input" else mask  # type: ignore[no-any-return]


def notices(program: ExportedProgram) -> list[str]:
    return [notice for notice in record_of(program).notices if SAID in notice]


def ran(program: ExportedProgram, x: Tensor, mask: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [result.float() for result in program.module()(x, mask)]


def in_file(path: Path, x: Tensor, mask: Tensor, *, reference: bool) -> list[Tensor]:
    if reference:
        runs: Any = ReferenceEvaluator(onnx.load(path))
    else:
        runs = qcompile.onnx_session(path)
    found = runs.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    return [torch.from_numpy(np.asarray(result, dtype=np.float32)) for result in found]


def check(kind: str, recipe: str, dtype: torch.dtype, target: Any, folder: Path, *, reference: bool = True) -> None:
    model, mask = Net(**MODELS[kind]).eval(), as_input(kind, MASK)
    program = quantize(model, mask, recipe=recipe, dtype=dtype)
    (notice,) = notices(program)
    assert "in attn " in notice
    found, bias = ran(program, X, mask), model.attn.o.bias.detach()
    with torch.no_grad():
        floats = model(X, mask)
    for got, wanted in zip(found, floats, strict=True):
        assert float((got[~ROWS] - wanted[~ROWS]).norm() / wanted[~ROWS].norm()) < 0.12
    assert not found[0][ROWS].any()
    torch.testing.assert_close(found[1][ROWS], bias.to(dtype).float().expand(2, 32), rtol=2e-2, atol=2e-2)
    report = qcompile.export_onnx(program, folder / "m.onnx", target=target)
    assert notice in report.notices
    left = any("for TensorRT" in decline.reason for decline in report.declined)  # so the file is nearer to the model
    for by_reference in (False, True)[: 1 + reference]:
        in_onnx = in_file(folder / "m.onnx", X, mask, reference=by_reference)
        assert not in_onnx[0][ROWS].any()
        for got, wanted in zip(in_onnx, found, strict=True):
            assert torch.equal(got.isfinite(), wanted.isfinite())
            assert float((got - wanted).norm() / wanted.norm()) < (0.1 if left else 0.02)


@pytest.mark.parametrize(
    ("kind", "recipe", "dtype", "target"),
    [
        ("input", "fp8", torch.float16, "tensorrt"),
        pytest.param("bool", "int8", torch.float16, "portable", marks=pytest.mark.slow),
        pytest.param("eager", DYNAMIC, torch.float32, "portable", marks=pytest.mark.slow),
    ],
)
def test_files_and_program_agree(kind: str, recipe: str, dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    check(kind, recipe, dtype, target, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recipe", "dtype"),
    list(itertools.product(MODELS, ["fp8", "int8", DYNAMIC], [torch.float32, torch.float16])),
)
def test_every_spelling_recipe_and_dtype(kind: str, recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    for target in ("portable", "tensorrt"):
        check(kind, recipe, dtype, target, tmp_path)


@pytest.mark.parametrize("recipe", ["fp8", pytest.param(DYNAMIC, marks=pytest.mark.slow)])
def test_a_model_without_such_queries_gets_no_node_more(recipe: str) -> None:
    program = quantize(Net(), FULL, recipe=recipe)
    assert not notices(program)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not targets & {"aten.masked_fill.Scalar", "aten.any.dim"}


def test_a_stored_mask_needs_no_data() -> None:
    model = Net()
    model.register_buffer("stored", MASK[:1])
    model.forward = lambda x: model.attn(x, model.stored)  # type: ignore[method-assign, assignment, misc]
    program = qcompile.quantize(model.eval(), (X,), recipe=DYNAMIC, progress=False)
    assert notices(program)
    assert not program.module()(X)[0][:, 3].any()


def test_data_is_used_for_masks_alone_where_nothing_else_needs_it() -> None:
    program = quantize(Net(mask=added(None)), recipe=DYNAMIC, dtype=torch.float32)
    (used,) = [notice for notice in record_of(program).notices if "calibration data is used" in notice]
    assert "what masks hide" in used and "torch.float32" in used
    assert notices(program)
    assert not notices(quantize(Net(mask=added(None)), recipe=DYNAMIC, calibration=None))  # nothing can be known


@pytest.mark.slow
def test_a_model_that_is_quantized_already_is_calibrated_for_it() -> None:
    model, mask, full = Net(), *(as_input("input", keep) for keep in (MASK, FULL))
    program = quantize(model, full, recipe="int8")
    assert not notices(program) and ran(program, X, mask)[0][ROWS].any()
    imported = qcompile.import_quantized(program, calibration=[(X, mask)], progress=False)
    assert notices(imported)
    before, after = ran(program, X, mask), ran(imported, X, mask)
    assert not after[0][ROWS].any()
    torch.testing.assert_close(after[0][~ROWS], before[0][~ROWS], rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_left_padding_under_a_causal_mask_and_other_sizes(tmp_path: Path) -> None:
    """One batch among several has such queries; batch and length are dynamic."""
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 3: Dim.DYNAMIC})
    model = Net(causal=True).eval()

    def padded(batch: int, length: int, by: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, length, 32), (torch.arange(length) >= by).expand(batch, 1, 1, length).contiguous()

    batches = [padded(2, 8, 0), padded(3, 9, 2), padded(2, 6, 0)]
    program = qcompile.quantize(
        model, batches[0], recipe="fp8", calibration=batches, dynamic_shapes=shapes, progress=False
    )
    assert notices(program)
    qcompile.export_onnx(program, tmp_path / "m.onnx")
    x, mask = padded(4, 11, 5)
    for found in (ran(program, x, mask)[0], in_file(tmp_path / "m.onnx", x, mask, reference=False)[0]):
        assert not found[:, :5].any()
        wanted = model(x, mask)[0][:, 5:].detach()
        assert float((found[:, 5:] - wanted).norm() / wanted.norm()) < 0.1


_PROGRAMS: dict[str, Any] = {}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 0.6), st.sampled_from(["bool", "min"]))
def test_random_masks(seed: int, density: float, kind: str) -> None:
    """Hidden queries and the others, against plain torch under a boolean mask."""
    if kind not in _PROGRAMS:
        _PROGRAMS[kind] = quantize(Net(**MODELS[kind]), recipe="int8", dtype=torch.float32).module()
    random = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(2, LENGTH, 32, generator=random), torch.rand(2, 1, LENGTH, LENGTH, generator=random) < density
    with torch.no_grad():
        found, wanted = _PROGRAMS[kind](x, mask)[0], Net().attn(x, mask)[0]
    rows = ~mask.any(-1)[:, 0]
    assert not wanted[rows].any() and not found[rows].any()
    assert float((found - wanted).norm()) <= 0.1 * float(wanted.norm())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "recipe", "target"),
    [
        ("min", DYNAMIC, "eager"),
        *(
            pytest.param(kind, recipe, target, marks=pytest.mark.slow)
            for kind, recipe, target in itertools.product(["bool", "input"], ["fp8", "int8"], ["eager", "inductor"])
        ),
    ],
)
def test_torch_compile_with_a_calibrated_state_has_the_numbers_of_the_program(
    kind: str, recipe: str, target: str
) -> None:
    torch._dynamo.reset()
    model, mask, full = Net(**MODELS[kind]).eval(), *(as_input(kind, keep) for keep in (MASK, FULL))
    state = qcompile.calibrate(model, (X, mask), recipe=recipe, calibration=[(X, mask)], progress=False)
    assert bool(state["attn.fully_masked"])
    wanted = ran(quantize(model, mask, recipe=recipe, calibration=state, dtype=torch.float32), X, mask)
    assert not wanted[0][ROWS].any()
    options = {"recipe": recipe, "calibration": state, "target": target}
    run = torch.compile(model, backend="qcompile", options=options)
    with torch.no_grad():
        found = run(X, mask)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert any(SAID in notice for notice in qcompile.explain(run).graphs[0].notices)
    without = qcompile.calibrate(model, (X, full), recipe=recipe, calibration=[(X, full)], progress=False)
    assert "attn.fully_masked" not in without


@pytest.mark.slow
def test_a_program_with_a_stored_mask_is_compiled_as_it_is() -> None:
    torch._dynamo.reset()
    model = Net()
    model.register_buffer("stored", MASK[:1])
    model.forward = lambda x: model.attn(x, model.stored)  # type: ignore[method-assign, assignment, misc]
    program = qcompile.quantize(model.eval(), (X,), recipe=DYNAMIC, dtype=torch.float32, progress=False)
    run = torch.compile(program.module(), backend="qcompile", options={"target": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(run(X), program.module()(X))
    assert not any(SAID in notice for notice in qcompile.explain(run).graphs[0].notices)
