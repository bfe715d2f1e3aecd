"""Every way to write attention, softmax and complex arithmetic that passes read: the files against plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import qcompile
from tests.passes.normalize import test_attention as forms
from tests.passes.normalize.test_attention import DECLINED, FORMS, Eager, inputs
from tests.passes.normalize.test_complex import FACTORS, Rotary
from tests.passes.normalize.test_flex_attention import UNDERSTOOD, K, Q, V
from tests.passes.normalize.test_softmax import WRITTEN, Written

pytest.importorskip("onnxruntime", reason="it runs the files: pip install 'qcompile[onnxruntime]'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads of the query for each of the key."""
    q = q.reshape(*q.shape[:2], -1, 2, q.shape[-1])
    p = torch.einsum("b s g r d, b t g d -> b g r s t", q, k[:, :, ::2]).softmax(-1)
    return torch.einsum("b g r s t, b t g d -> b s g r d", p, v[:, :, ::2])


def by(scores: str, values: str) -> Callable[..., Tensor]:
    """Attention by two einsums, of q, k, v `[B, S, H, D]`."""
    return lambda q, k, v: torch.einsum(values, torch.einsum(scores, q, k).softmax(-1), v)


EINSUMS = (
    by("bihd,bjhd->bhij", "bhij,bjhd->bihd"),
    by("B I H D, B J H D -> B H I J", "B H I J, B J H D -> B I H D"),
    by("bi...d,bj...d->b...ij", "b...ij,bj...d->bi...d"),
    by("bihd,bjhd->bhij", "bhij,bjhd->bhdi"),
    grouped,
)


SIDE = {
    "metadata": {"name": "side", "description": "One layer of which no form knows."},
    "calibration": {"algorithm": "max"},
    "rules": [
        {"quantizer": f"side.{of}_quantizer", "format": "fp8", "granularity": "per_tensor"}
        for of in ("weight", "input")
    ],
}


class Applied(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


class Forms(nn.Module):
    """What each of `forms` makes of the same inputs, and a linear layer of `[2, 16]`: a recipe wants one."""

    def __init__(self, forms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.forms = nn.ModuleList(forms)
        self.side = nn.Linear(16, 16)

    def forward(self, side: Tensor, *args: Tensor) -> tuple[Any, ...]:
        return (self.side(side), *(form(*args) for form in self.forms))


def models() -> dict[str, tuple[Forms, tuple[Tensor, ...], int]]:
    """Name -> model, inputs, and how many attentions are found in it."""
    side, qkv = torch.randn(2, 16), tuple(torch.randn(2, n, 4, 8) for n in (5, 7, 7))
    # heads are mixed by linear layers, which are quantized; TensorRT has no softmax of one axis, product of integers,
    # or cast to FP8; a learned scale is one of the query before attentions are looked for
    left = {forms.not_a_number, forms.mixed_heads, forms.one_vector, forms.of_integers, forms.learned_scale}
    left |= {forms.rounded, forms.rounded_scores}
    declined = [form for form, _ in DECLINED if form not in left]
    rotary = torch.randn(2, 5, 8), torch.tensor([0, 3, 1, 2, 5])
    return {
        "attention": (Forms([Eager(form) for form in FORMS]), (side, *inputs()), len(FORMS)),
        "declined": (Forms([Eager(form) for form in declined]), (side, *inputs()), 0),
        "einsum": (Forms([Applied(form) for form in EINSUMS]), (side, *qkv), len(EINSUMS)),
        "flex_attention": (Forms(list(UNDERSTOOD.values())), (side, Q, K, V), len(UNDERSTOOD)),
        "softmax": (Forms([Written(f) for f in WRITTEN]), (side, torch.randn(2, 5, 7), torch.randn(2, 7, 4)), 0),
        "complex": (Forms([Rotary(f) for f in FACTORS.values()]), (side, *rotary), 0),
    }


def results(path: Path, args: Sequence[Tensor]) -> list[Tensor]:
    session = qcompile.onnx_session(path)
    feed = dict(zip((node.name for node in session.get_inputs()), (t.numpy() for t in args), strict=True))
    return [torch.from_numpy(result) for result in session.run(None, feed)]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", models())
def test_unquantized_the_file_gives_what_plain_torch_gives(name: str, tmp_path: Path) -> None:
    model, args, _ = models()[name]
    with torch.no_grad():
        want = pytree.tree_leaves(model.eval()(*args)[1:])
    program = qcompile.quantize(model, args, recipe=SIDE, calibration=[args], dtype=torch.float32, progress=False)
    qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    for index, (got, result) in enumerate(zip(results(tmp_path / "m.onnx", args)[1:], want, strict=True)):
        assert_close(got, result, rtol=1e-4, atol=1e-4, msg=f"form {index}")


@pytest.mark.parametrize("name", models())
def test_quantized_the_files_agree_with_the_program_and_build(name: str, tmp_path: Path) -> None:
    model, args, attentions = models()[name]
    program = qcompile.quantize(model, args, recipe="fp8", calibration=[args], progress=False)
    with torch.no_grad():
        want, got = (pytree.tree_leaves(run(*args)[1:]) for run in (model.eval(), program.module()))
    for index, (result, quantized) in enumerate(zip(want, got, strict=True)):
        assert (quantized.float() - result).norm() < 0.1 * result.norm(), f"form {index}"
    report = qcompile.export_onnx(program, tmp_path / "portable.onnx", target="portable")
    assert report.coverage.get("attention", (0, 0))[0] == attentions
    report = qcompile.export_onnx(program, tmp_path / "tensorrt.onnx", target="tensorrt")
    unfused = [decline for decline in report.declined if decline.pass_name == "LeaveUnfusedAttention"]
    assert len(unfused) == attentions and report.coverage.get("attention", (0, 0))[0] == 0  # 7 keys are too few
    for index, (file, quantized) in enumerate(zip(results(tmp_path / "portable.onnx", args)[1:], got, strict=True)):
        assert (file.float() - quantized.float()).norm() < 0.02 * quantized.float().norm(), f"form {index}"
    pytest.importorskip("tensorrt_rtx", reason="the builder: pip install 'qcompile[tensorrt-rtx]'")
    assert qcompile.build_engine(tmp_path / "tensorrt.onnx", target="sm89", progress=False).kernels
