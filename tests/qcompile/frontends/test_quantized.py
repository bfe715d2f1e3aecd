"""What is quantized already is refused at the start, with what to do instead; floats are not taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.errors import QCompileError
from qcompile.frontends.quantized import is_quantized, quantized_by

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def program() -> Any:
    return qcompile.quantize(Net().eval(), (X,), recipe="fp8_per_channel_per_token")


def by_torchao() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model := Net().eval(), torchao.Float8WeightOnlyConfig())
    return model


def by_modelopt() -> nn.Module:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    model: nn.Module = mtq.quantize(Net().eval(), mtq.FP8_DEFAULT_CFG, lambda m: m(X))
    return model


def by_torch() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear})


class Fp8Weight(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up.weight = nn.Parameter(self.up.weight.to(torch.float8_e4m3fn), requires_grad=False)


def fake_quantized() -> Any:
    class Fake(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127))

    return torch.export.export(Fake().eval(), (X,))


class Inside(nn.Module):
    """A quantized program as a part of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = program().module(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x))


CASES: dict[str, tuple[Callable[[], Any], str, bool]] = {
    "program": (program, r"by qcompile \(up\)", True),
    "module of a program": (lambda: program().module(), r"by qcompile \(up\)", True),
    "inside": (Inside, "by qcompile", True),
    "torchao": (by_torchao, r"by torchao \(up\.weight\)", True),
    "modelopt": (by_modelopt, r"by nvidia-modelopt \(up\.input_quantizer\)", True),
    "torch.ao": (by_torch, r"quantized.dynamic.*\(up\)", False),
    "codes": (Fp8Weight, r"float8_e4m3fn \(up\.weight\)", False),
    "fake": (fake_quantized, "fake quantization", False),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_what_is_quantized_is_refused_at_the_start(name: str) -> None:
    make, message, readable = CASES[name]
    model = make()
    args = () if isinstance(model, torch.export.ExportedProgram) else (X,)
    way_out = "import_quantized" if readable else "in floating point"
    for call in (qcompile.quantize, qcompile.calibrate):
        with pytest.raises(QCompileError, match=f"quantized already, .*{message}.*{way_out}"):
            call(model, args, recipe="fp8", calibration=[X], progress=False)
    assert is_quantized(model) is readable
    if isinstance(model, nn.Module):
        with pytest.raises(QCompileError, match="quantized already"):
            qcompile.save_checkpoint(model, "nowhere", format="fp8")


def test_import_takes_the_module_of_a_program() -> None:
    first = program()
    again = qcompile.import_quantized(first.module(), (X,))
    torch.testing.assert_close(again.module()(X), first.module()(X), rtol=0, atol=0)


class Small(Net):
    """Integers, booleans and half precision are no codes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(32, dtype=torch.int8))
        self.register_buffer("mask", torch.ones(32, dtype=torch.bool))


def test_a_float_model_is_not_quantized() -> None:
    models: list[Any] = [Net(), Small(), Net().to(torch.bfloat16), torch.export.export(Net(), (X,))]
    assert [quantized_by(model) for model in models] == [None] * 4
    assert quantized_by(torch.export.export(Net(), (X,)).module()) is None
