"""Models of pt2e quantizers through `import_quantized`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from passes.graph import aten, calls
from passes.ir import DEQUANTIZE
from qcompile.frontends import pt2e
from tests.passes.support import Attention
from tests.qcompile.frontends.support import annotates_linear

quantize_pt2e: Any = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")


class Layers(nn.Module):
    """Attention with projections, and one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = Attention(2, 32), nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x).transpose(1, 2).flatten(2).relu())  # type: ignore[no-any-return]


def x86() -> Any:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as inductor

    return inductor.X86InductorQuantizer().set_global(inductor.get_default_x86_inductor_quantization_config())


def xnnpack() -> Any:
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


X = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))


def converted(quantizer: Any, *, fold: bool = True) -> Any:
    torch.manual_seed(0)
    prepared = quantize_pt2e.prepare_pt2e(torch.export.export(Layers().eval(), (X,)).module(), quantizer)
    prepared(X)
    return quantize_pt2e.convert_pt2e(prepared, fold_quantize=fold)


@pytest.mark.everyday(1)
@pytest.mark.parametrize(("quantizer", "fold"), [(x86, True), (x86, False), (xnnpack, True)])
def test_the_graph_computes_what_it_did(quantizer: Any, fold: bool) -> None:
    model = converted(quantizer(), fold=fold)
    if not annotates_linear(model):
        pytest.skip("torchao's quantizer leaves this torch's graph as it was")
    assert pt2e.is_quantized(model)
    program = qcompile.import_quantized(model, (X,), dtype=torch.float32)
    with torch.no_grad():
        want = model(X)
    # a tie falls to the other side here and there
    assert float((program.module()(X) - want).norm() / want.norm()) < 2e-3
    for linear in calls(program.graph, aten.linear.default):
        assert all(operand.target is DEQUANTIZE for operand in linear.args[:2])  # type: ignore[union-attr]
    weights = [tensor for tensor in program.state_dict.values() if tensor.ndim == 2 and tensor.shape[1] == 64]
    assert len(weights) == 4
    assert all(weight.dtype == torch.int8 for weight in weights)
    assert "attention.q_proj.weight" in program.state_dict
    with pytest.raises(NotImplementedError):  # as the tool left it
        model.eval()


def test_other_models_are_not_its_own() -> None:
    assert not pt2e.is_quantized(nn.Linear(2, 2))
    assert not pt2e.is_quantized(torch.export.export(nn.Linear(2, 2), (torch.randn(1, 2),)).module())


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [x86, xnnpack])
def test_every_linear_is_int8_in_the_engine(quantizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    program = qcompile.import_quantized(converted(quantizer()), (X,))
    qcompile.export_onnx(program, tmp_path / "model.onnx")
    engine = qcompile.build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", target="sm89")
    gemms = dict(engine.gemms)
    assert gemms.pop("int8") == 2  # q, k and v are one
    assert not any(gemms.values())
