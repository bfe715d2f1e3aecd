"""export_onnx: every opset and target verifies and runs, names, placement of files, and what is refused."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import qcompile
from qcompile.capture import capture
from qcompile.errors import ExportError, VerificationError
from qcompile.onnx import export as export_module
from qcompile.onnx import save as save_module
from qcompile.onnx.verify import Check, verify_onnx

X = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0))


class Decoder(nn.Module):
    """A norm, a causal grouped-query attention with a residual, and a head."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.o = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).reshape(x.shape[0], x.shape[1], -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True)
        return self.lm_head(x + self.o(a.transpose(1, 2).flatten(2)))


def quantize(model: nn.Module, *args: Tensor, **options: Any) -> ExportedProgram:
    return qcompile.quantize(model.eval(), args, **{"calibration": [args], "progress": False, **options})


@pytest.fixture(scope="module")
def decoder() -> ExportedProgram:
    torch.manual_seed(0)
    dynamic = ({0: Dim("batch", max=8), 1: Dim.DYNAMIC},)
    return quantize(Decoder(), X, dynamic_shapes=dynamic, dtype=torch.float32)


@pytest.fixture(scope="module")
def encoder() -> ExportedProgram:
    torch.manual_seed(0)
    return quantize(Decoder(causal=False), X)


@pytest.fixture(scope="module")
def linear() -> ExportedProgram:
    torch.manual_seed(0)
    return quantize(nn.Linear(16, 8), torch.randn(4, 16))


def run(path: Path, *args: Tensor) -> list[np.ndarray]:
    session = qcompile.onnx_session(path)
    return session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)})


def domains(path: Path) -> set[str]:
    model = onnx.load(path)
    return {node.domain for node in model.graph.node} | {f.domain for f in model.functions}


def test_bfloat16_gets_the_opset_that_has_its_activations(tmp_path: Path) -> None:
    """HardSwish, Softplus and others take bfloat16 from opset 22 on; torch.onnx writes them before it all the same."""
    x = torch.randn(4, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.Hardswish(), nn.Softplus(), nn.Linear(16, 16))
    program = quantize(model, x, dtype=torch.bfloat16)
    assert qcompile.export_onnx(program, tmp_path / "a.onnx", target="portable").opset == 22
    onnx.checker.check_model(onnx.load(tmp_path / "a.onnx"), full_check=True)


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    ("opset", "targets"),
    [(19, ["tensorrt", "portable"]), (20, ["tensorrt"]), (21, ["portable"]), (22, ["tensorrt"]), (23, ["portable"])],
)
def test_every_opset_verifies_and_runs(
    decoder: ExportedProgram, tmp_path: Path, opset: int, targets: list[str]
) -> None:
    y = torch.randn(3, 40, 32)  # neither size is the captured one
    for target in targets:
        expected = {"", "trt"} if target == "tensorrt" else {""}
        path = tmp_path / f"{target}.onnx"
        report = qcompile.export_onnx(decoder, path, target=target, opset=opset)  # type: ignore[arg-type]
        model = onnx.load(path)
        assert {(o.domain, o.version) for o in model.opset_import if not o.domain} == {("", opset)}
        assert report.opset == opset and domains(path) == expected
        assert report.ops == Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in model.graph.node)
        assert report.checks == verify_onnx(path, {"output": {"x"}}) and all(check.passed for check in report.checks)
        assert report.bytes == path.stat().st_size
        for x in (X, y):
            with torch.no_grad():
                wanted = decoder.module()(x).numpy()
            (found,) = run(path, x)
            assert found.shape == wanted.shape
            assert np.linalg.norm(found - wanted) < 5e-3 * np.linalg.norm(wanted)


def test_the_function_is_there_for_a_causal_attention_only(encoder: ExportedProgram, tmp_path: Path) -> None:
    report = qcompile.export_onnx(encoder, tmp_path / "m.onnx")
    assert domains(tmp_path / "m.onnx") == {""} and not any("::" in op for op in report.ops)
    assert report.ops["Softmax"] == 1 and report.quantized[""] == "fp8"


@pytest.mark.everyday(2)
@pytest.mark.parametrize("opset", [17, 18, 24, 0])
def test_other_opsets_are_an_error(linear: ExportedProgram, tmp_path: Path, opset: int) -> None:
    with pytest.raises(ExportError, match=f"opset {opset} is not supported: FP8 needs 19 or later, .* up to 23"):
        qcompile.export_onnx(linear, tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_what_is_no_program_or_target(linear: ExportedProgram, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="a Linear is not a program"):
        qcompile.export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="unknown target 'ort'; known: tensorrt, portable"):
        qcompile.export_onnx(linear, tmp_path / "m.onnx", target="ort")  # type: ignore[arg-type]


@pytest.mark.everyday(1)
@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_int8(tmp_path: Path, target: Any) -> None:
    program = quantize(Decoder(causal=False), X, recipe="int8", dtype=torch.float32)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", target=target, opset=19)
    assert report.quantized["o"] == "int8" and report.unquantized == {"lm_head": "linear", "": "attention"}
    with torch.no_grad():
        wanted = program.module()(X).numpy()
    (found,) = run(tmp_path / "m.onnx", X)
    assert np.linalg.norm(found - wanted) < 5e-3 * np.linalg.norm(wanted)


def test_symbolic_dimensions(decoder: ExportedProgram, tmp_path: Path) -> None:
    qcompile.export_onnx(decoder, tmp_path / "m.onnx")
    session = qcompile.onnx_session(tmp_path / "m.onnx")
    ((batch, length, width),) = (i.shape for i in session.get_inputs())
    assert isinstance(batch, str) and isinstance(length, str) and batch != length and width == 32
    assert [o.shape for o in session.get_outputs()] == [[batch, length, 8]]


class Interface(nn.Module):
    """Inputs and outputs of every kind; `unused` must stay an input, as callers will feed it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(16, 16)

    def forward(self, input: Tensor, unused: Tensor, absent: Tensor | None = None, factor: int = 2) -> Any:
        y = self.linear(input) * factor
        return {
            "tensor": y,
            "tuple": (y, y, None, input, self.linear.weight),
            "returned": input,
            "dict": {"logits": y, "state": [y + 1, {"deep": y + 2}]},
            "clash": {"input": y, "linear.weight": y + 1, "linear": y + 2},
            "twice": {"a": {"b": y}, "a_b": y + 1},
            "number": (y, 3),
        }[self.kind]


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("tensor", ["output"]),
        ("tuple", ["output_0", "output_1", "output_3", "output_4"]),
        ("returned", ["output"]),
        ("dict", ["logits", "state_0", "state_1_deep"]),
        ("clash", ["input_output", "linear.weight", "linear"]),
        ("twice", ["a_b", "a_b_output"]),
    ],
)
def test_names_of_inputs_and_outputs(tmp_path: Path, kind: str, names: list[str]) -> None:
    x, unused = torch.randn(4, 16), torch.randn(3)
    args, model = (x, unused), Interface(kind).eval()
    program = quantize(model, *args, dtype=torch.float32) if kind == "tensor" else capture(model, args)
    report = qcompile.export_onnx(program, tmp_path / "m.onnx", compare=(x, unused))
    session = qcompile.onnx_session(tmp_path / "m.onnx")
    assert [i.name for i in session.get_inputs()] == ["input", "unused"]
    assert [o.name for o in session.get_outputs()] == names
    found = session.run(None, {"input": x.numpy(), "unused": unused.numpy()})
    leaves = [v for v in torch.utils._pytree.tree_leaves(program.module()(x, unused)) if v is not None]
    for a, b in zip(found, leaves, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-3, atol=1e-4)
    assert report.comparison is not None and report.comparison.worst(1)[0].badness < 1e-4


def test_a_number_among_the_outputs_is_an_error(tmp_path: Path) -> None:
    program = quantize(Interface("number"), torch.randn(4, 16), torch.randn(3))
    with pytest.raises(ExportError, match="returns 3, but an ONNX graph can return tensors only"):
        qcompile.export_onnx(program, tmp_path / "m.onnx")


def test_arguments_that_were_none_or_numbers_are_no_inputs(tmp_path: Path) -> None:
    class Options(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor, mask: Tensor | None = None, factor: int = 2, bias: Tensor | None = None) -> Tensor:
            y = self.linear(x) * factor
            return y + bias if bias is not None else y

    x, bias = torch.randn(4, 16), torch.randn(16)
    batch = {"x": x, "mask": None, "factor": 3, "bias": bias}
    program = qcompile.quantize(Options(), (), batch, calibration=[batch], progress=False)
    qcompile.export_onnx(program, tmp_path / "m.onnx", compare=batch)
    session = qcompile.onnx_session(tmp_path / "m.onnx")
    assert [i.name for i in session.get_inputs()] == ["x", "bias"]
    (found,) = session.run(None, {"x": x.numpy(), "bias": bias.numpy()})
    np.testing.assert_allclose(found, program.module()(**batch).detach().numpy(), rtol=1e-2, atol=1e-2)


def test_a_program_that_writes_to_its_state_is_an_error(tmp_path: Path) -> None:
    class Counter(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x)

    program = torch.export.export(Counter(), (torch.randn(4, 16),))
    for plain in (program, program.run_decompositions({})):
        with pytest.raises(ExportError, match="writes to calls"):
            qcompile.export_onnx(plain, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_program_is_not_changed_and_the_file_is_always_the_same(encoder: ExportedProgram, tmp_path: Path) -> None:
    code, state = encoder.graph_module.code, {k: (id(v), v._version) for k, v in encoder.state_dict.items()}
    for name in ("a.onnx", "b.onnx"):
        qcompile.export_onnx(encoder, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert encoder.graph_module.code == code
    assert {k: (id(v), v._version) for k, v in encoder.state_dict.items()} == state


def test_no_path_of_this_machine_and_no_stack_trace_in_the_file(linear: ExportedProgram, tmp_path: Path) -> None:
    qcompile.export_onnx(linear, tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    places = [__file__, str(Path(torch.__file__).parent), str(Path.cwd()), str(tmp_path), 'File "', ".py"]
    assert not [place for place in places if place.encode() in content]
    keys = {p.key for node in onnx.load(tmp_path / "m.onnx").graph.node for p in node.metadata_props}
    assert keys == {"pkg.torch.onnx.name_scopes"}


def test_a_program_that_was_saved_and_loaded(linear: ExportedProgram, tmp_path: Path) -> None:
    torch.export.save(linear, tmp_path / "p.pt2")
    reports = [
        qcompile.export_onnx(program, tmp_path / f"{i}.onnx")
        for i, program in enumerate((linear, torch.export.load(tmp_path / "p.pt2")))
    ]
    assert reports[0].ops == reports[1].ops and reports[0].quantized == reports[1].quantized
    x = torch.randn(4, 16)
    assert np.array_equal(run(tmp_path / "0.onnx", x)[0], run(tmp_path / "1.onnx", x)[0])


def test_large_weights_go_to_a_file_of_their_own(
    linear: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 16)
    qcompile.export_onnx(linear, tmp_path / "inside.onnx")
    monkeypatch.setattr(save_module, "EMBEDDED_BYTES", 100)
    report = qcompile.export_onnx(linear, tmp_path / "m.onnx")
    files = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    inside = files.pop("inside.onnx")
    assert len(files) == 2 and report.bytes == sum(files.values()) > inside / 2
    assert np.array_equal(run(tmp_path / "m.onnx", x)[0], run(tmp_path / "inside.onnx", x)[0])
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)


@pytest.mark.parametrize("limit", [100, 10**9])
def test_a_failed_check_leaves_the_old_file_and_nothing_else(
    linear: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")
    monkeypatch.setattr(save_module, "EMBEDDED_BYTES", limit)
    monkeypatch.setattr(export_module, "verify_onnx", lambda *args: [Check("mine", False, "not today")])
    with pytest.raises(VerificationError, match="mine: not today"):
        qcompile.export_onnx(linear, tmp_path / "m.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx"}
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_file(
    linear: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")

    def full(model: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module.onnx_ir, "save", full)
    with pytest.raises(ExportError, match=r"cannot write .*m.onnx: no room is left on the disk"):
        qcompile.export_onnx(linear, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == ["m.onnx"] and (tmp_path / "m.onnx").read_bytes() == b"old"


def test_an_operator_without_an_onnx_form_is_named(tmp_path: Path) -> None:
    class Special(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(super().forward(x))

    program = quantize(Special(16, 8), torch.randn(4, 16))
    with pytest.raises(ExportError, match="bessel_j0"):
        qcompile.export_onnx(program, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_torch_onnx_says_nothing(linear: ExportedProgram, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    qcompile.export_onnx(linear, tmp_path / "new" / "m.onnx")  # the folder is made
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
