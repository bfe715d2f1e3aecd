"""Models of several dtypes, with complex numbers, with what has no half kernel: quantized, exported, run and built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import qcompile
from qcompile.report.record import record_of

pytest.importorskip("onnxruntime", reason="it runs the files: pip install 'qcompile[onnxruntime]'")

Middle = Callable[["Model", Tensor, Tensor], Tensor]


class Model(nn.Module):
    """Two linear layers `[B, S, 64]` with something between them that reads integers `[S]`, too."""

    def __init__(self, middle: Middle, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(64, 64).to(dtype), nn.Linear(64, 64).to(dtype)
        self.time, self.part = nn.Linear(64, 64).to(dtype), nn.Linear(64, 64).bfloat16()
        angles = torch.arange(16)[:, None] / 100 ** (torch.arange(32) / 32)
        self.register_buffer("factors", torch.polar(torch.ones_like(angles), angles))
        self.register_buffer("table", torch.randn(64).half())
        self.middle = middle

    def forward(self, x: Tensor, i: Tensor) -> Tensor:
        return self.after(self.middle(self, self.before(x), i).to(x.dtype))


def sinusoid(m: Model, x: Tensor, i: Tensor) -> Tensor:
    angle = i[:, None].float() * torch.exp(-torch.arange(32) / 8)
    return x + m.time(torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype))


def rotary(m: Model, x: Tensor, i: Tensor) -> Tensor:
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * m.factors[i]).flatten(-2)


def promoted(m: Model, x: Tensor, i: Tensor) -> Tensor:
    t = i[:, None].float() / 8
    mixed = torch.cat([torch.maximum(x, t), torch.where(x > 0, x, t), x.clamp(max=t) * (1.0 - i[:, None])], -1)
    return mixed[..., :64] + mixed[..., 64:128] * (i[:, None] > 1.5) + mixed[..., 128:] * m.table


def spectrum(m: Model, x: Tensor, i: Tensor) -> Tensor:
    return torch.stft(x.flatten(1), 126, 32, window=torch.hann_window(126), return_complex=True).abs().transpose(1, 2)


CASES: dict[str, tuple[Middle, torch.dtype, int]] = {
    "float32 before a quantizer": (sinusoid, torch.float32, 3),
    "complex numbers": (rotary, torch.float32, 2),
    "complex numbers of halves": (rotary, torch.float16, 2),
    "promoted": (promoted, torch.float16, 2),
    "promoted in float32": (promoted, torch.float32, 2),
    "a part in bfloat16": (lambda m, x, i: x + m.part(x.bfloat16()), torch.float32, 3),
    "no half kernel": (spectrum, torch.float32, 2),
    "quantiles": (lambda m, x, i: x / x.abs().quantile(0.9, 1, keepdim=True), torch.float32, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_quantized_and_the_files_agree_and_build(case: str, tmp_path: Path) -> None:
    middle, dtype, layers = CASES[case]
    model = Model(middle, dtype).eval()
    batch = (torch.randn(2, 10, 64, dtype=dtype), torch.arange(10))
    program = qcompile.quantize(model, batch, calibration=[batch], progress=False)
    with torch.no_grad():
        want, got = model(*batch).float(), program.module()(*batch)
    assert (got.float() - want).norm() < 0.1 * want.norm()
    for target in ("portable", "tensorrt"):
        report = qcompile.export_onnx(program, tmp_path / f"{target}.onnx", target=target)
        assert report.coverage["linear"] == (layers, layers)
        assert ("stft" in str(report.notices)) == (middle is spectrum)
    session = qcompile.onnx_session(tmp_path / "portable.onnx")
    feed = dict(zip((node.name for node in session.get_inputs()), (t.numpy() for t in batch), strict=True))
    file = torch.from_numpy(session.run(None, feed)[0])
    assert (file.float() - got.float()).norm() < 0.01 * got.float().norm()
    pytest.importorskip("tensorrt_rtx", reason="the builder: pip install 'qcompile[tensorrt-rtx]'")
    built = qcompile.build_engine(tmp_path / "tensorrt.onnx", target="sm89", progress=False)
    assert built.gemms["fp8"] == layers


COMPLEX: dict[str, Callable[[Model, Tensor, Tensor], object]] = {
    "input": lambda m, x, z: m.after(m.before(x) + torch.view_as_real(z * m.factors[:10]).flatten(-2)),
    "output": lambda m, x, z: torch.view_as_complex(m.before(x).unflatten(-1, (-1, 2))) * m.factors[:10].conj(),
    "both": lambda m, x, z: (m.before(x), z.conj() * (1 - m.factors[:10]), z.transpose(0, 1)),
    "handed on": lambda m, x, z: (m.before(x), z, m.factors),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", COMPLEX)
def test_complex_inputs_and_outputs_are_pairs_of_numbers_in_files(case: str, tmp_path: Path) -> None:
    class Complex(Model):
        def forward(self, x: Tensor, z: Tensor) -> Any:
            return COMPLEX[case](self, x, z)

    model = Complex(sinusoid).eval()
    batch = (torch.randn(2, 10, 64), torch.randn(2, 10, 32, dtype=torch.complex64))
    want = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tree_leaves(model(*batch))]
    program = qcompile.quantize(model, batch, calibration=[batch], progress=False)
    for target in ("portable", "tensorrt"):
        report = qcompile.export_onnx(program, tmp_path / f"{target}.onnx", target=target, compare=batch)
        assert report.comparison is not None and report.comparison.worst(1)[0].badness < 0.05
        assert any("no complex numbers: the file has" in notice for notice in report.notices)
        session = qcompile.onnx_session(tmp_path / f"{target}.onnx")
        feed = {"x": batch[0].numpy(), "z": torch.view_as_real(batch[1]).numpy()}
        results = session.run(None, {node.name: feed[node.name] for node in session.get_inputs()})
        for got, expected in zip(results, want, strict=True):
            assert (torch.from_numpy(got) - expected).norm() < 0.1 * expected.norm()
    pytest.importorskip("tensorrt_rtx", reason="the builder: pip install 'qcompile[tensorrt-rtx]'")
    assert qcompile.build_engine(tmp_path / "tensorrt.onnx", target="sm89", progress=False).gemms["fp8"]


def test_a_layer_without_a_half_kernel_is_named_in_the_report() -> None:
    model = Model(lambda m, x, i: F.local_response_norm(x[:, None].expand(-1, 3, -1, -1), 3)[:, 1]).eval()
    batch = (torch.randn(2, 10, 64), torch.arange(10))
    program = qcompile.quantize(model, batch, recipe="fp8_per_channel_per_token", progress=False)
    assert program.module()(*batch).isfinite().all()
    notices = record_of(program).notices
    assert [n for n in notices if "no kernel" in n] == [
        "in torch.float32, as torch has no kernel of it in half precision: avg_pool3d (avg_pool3d)"
    ]


UNWRITTEN: dict[str, Middle] = {
    "kthvalue": lambda m, x, i: x - x.kthvalue(3, 1, keepdim=True).values,
    "lgamma": lambda m, x, i: x.lgamma(),  # another operator once torch has decomposed it
}


@pytest.mark.parametrize("operator", UNWRITTEN)
def test_what_torch_does_not_write_is_named_with_its_module(operator: str, tmp_path: Path) -> None:
    model = Model(Outside(UNWRITTEN[operator])).eval()
    batch = (torch.randn(2, 10, 64), torch.arange(10))
    program = qcompile.quantize(model, batch, recipe="fp8_per_channel_per_token", progress=False)
    with pytest.raises(qcompile.QCompileError, match=f"^middle: torch.onnx does not write .*{operator};"):
        qcompile.export_onnx(program, tmp_path / "model.onnx", target="portable")


class Outside(nn.Module):
    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.middle = middle

    def forward(self, m: Model, x: Tensor, i: Tensor) -> Tensor:
        return self.middle(m, x, i)
