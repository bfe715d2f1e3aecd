"""Models of torchao's `quantize_` through `import_quantized`, against torchao's own layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from passes.formats import FP8, FP8_1X128, FP8_128X128, FP8_PER_TOKEN, INT8, INT8_PER_TOKEN, NVFP4, Format
from passes.graph import calls
from passes.ir import DYNAMIC_QUANTIZE
from qcompile.errors import CaptureError
from qcompile.frontends import torchao
from qcompile.schemes.layer import QuantizedLinear
from qcompile.schemes.scheme import Scheme
from tests.qcompile.frontends.support import scales_rows_on_cpu

quant_api: Any = pytest.importorskip("torchao.quantization.quant_api")
granularity: Any = pytest.importorskip("torchao.quantization.granularity")
nvfp4: Any = pytest.importorskip("torchao.prototype.mx_formats.inference_workflow")

ROW, TENSOR = granularity.PerRow(), granularity.PerTensor()
BLOCKS = (granularity.PerBlock([1, 128]), granularity.PerBlock([128, 128]))


class Block(nn.Module):
    """q, k, v with attention, gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(256, 256, bias=b) for b in (True, False, True))
        self.o_proj, self.gate, self.up = nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        y = self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.gate(y).relu() * self.up(y)  # type: ignore[no-any-return]


def fp8(how: Any) -> Any:
    return quant_api.Float8DynamicActivationFloat8WeightConfig(granularity=how)


def dynamic_nvfp4() -> Any:
    return nvfp4.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)


CASES: dict[str, tuple[Callable[[], Any], torch.dtype, Scheme]] = {
    "fp8_tensor": (lambda: fp8(TENSOR), torch.float32, Scheme(FP8, FP8, measured=True)),
    "fp8_row": (lambda: fp8(ROW), torch.bfloat16, Scheme(FP8, FP8_PER_TOKEN, per_channel=True)),
    "fp8_blocks": (lambda: fp8(BLOCKS), torch.bfloat16, Scheme(FP8_128X128, FP8_1X128)),
    "fp8_weight": (quant_api.Float8WeightOnlyConfig, torch.float32, Scheme(FP8, per_channel=True)),
    "int8": (
        quant_api.Int8DynamicActivationInt8WeightConfig, torch.float32, Scheme(INT8, INT8_PER_TOKEN, per_channel=True)
    ),
    "int8_weight": (quant_api.Int8WeightOnlyConfig, torch.float32, Scheme(INT8, per_channel=True)),
    "nvfp4": (dynamic_nvfp4, torch.bfloat16, Scheme(NVFP4, NVFP4, measured=True)),
    "nvfp4_weight": (nvfp4.NVFP4WeightOnlyConfig, torch.float32, Scheme(NVFP4)),
}  # fmt: skip
ON_CPU = {"fp8_row", "fp8_tensor", "fp8_weight", "int8", "int8_weight", "nvfp4_weight"}  # torch can run these here


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[nn.Module, Tensor]]:
    """torchao's hardware checks are in the way of quantizing, which runs anywhere."""
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda *_: None)
    monkeypatch.setattr(nvfp4, "is_sm_at_least_100", lambda: True)

    def make(case: str) -> tuple[nn.Module, Tensor]:
        config, dtype, _ = CASES[case]
        model = Block().eval().to(dtype)
        quant_api.quantize_(model, config(), filter_fn=lambda module, _: isinstance(module, nn.Linear))
        return model, torch.randn(2, 40, 256).to(dtype)

    return make


@pytest.mark.parametrize("case", CASES)
def test_layers_keep_codes_and_scales(case: str, quantized: Any) -> None:
    model, x = quantized(case)
    assert torchao.is_quantized(model)
    originals = dict(model.named_children())
    want = {name: layer.weight.dequantize() for name, layer in originals.items()}
    with torchao.capture_ready(model) as ready:
        for name, layer in ready.named_children():
            assert isinstance(layer, QuantizedLinear)
            assert layer.scheme == CASES[case][2]
            torch.testing.assert_close(layer._dequantized(x.dtype), want[name].to(x.dtype), rtol=1e-6, atol=0)
        outputs = {name: layer(x) for name, layer in ready.named_children()}
    assert dict(model.named_children()) == originals
    if case in ON_CPU and (case != "fp8_row" or scales_rows_on_cpu()):
        for name, layer in originals.items():
            own = layer(x).float()
            # scales of activations: torchao rounds those of FP8 to bfloat16, and those of INT8 are amax / 127.5 there
            assert float((outputs[name].float() - own).norm() / own.norm()) < 1.5e-2


@pytest.mark.everyday(2)
@pytest.mark.parametrize(("case", "shared"), [("fp8_tensor", 3), ("fp8_row", 3), ("int8", 3), ("nvfp4", 3)])
def test_layers_with_one_input_share_its_quantizer(case: str, shared: int, quantized: Any) -> None:
    model, x = quantized(case)
    program = qcompile.import_quantized(model, (x,), dtype=x.dtype)
    assert sum(1 for _ in calls(program.graph, DYNAMIC_QUANTIZE)) == shared  # q, k, v; o; gate, up
    assert not any(type(module) is QuantizedLinear for module in model.modules())


def test_what_the_ir_cannot_say_is_named() -> None:
    model = nn.Sequential(nn.Linear(256, 256, dtype=torch.bfloat16))
    quant_api.quantize_(model, quant_api.IntxWeightOnlyConfig())
    with (
        pytest.raises(CaptureError, match="0: torchao's IntxUnpackedToInt8Tensor is no format"),
        torchao.capture_ready(model),
    ):
        pass
    model = nn.Sequential(nn.Linear(256, 256))
    quant_api.quantize_(model, quant_api.Int8WeightOnlyConfig(granularity=granularity.PerGroup(32)))
    with pytest.raises(CaptureError, match="0: a scale of shape"), torchao.capture_ready(model):
        pass


def test_one_layer_alone_is_not_a_model() -> None:
    model = nn.Linear(64, 64)
    quant_api.quantize_(model, quant_api.Int8WeightOnlyConfig())
    with pytest.raises(CaptureError, match="put it into a module"), torchao.capture_ready(model):
        pass
    assert not torchao.is_quantized(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind", "target"), [
    ("fp8_tensor", "fp8", "sm89"), ("fp8_row", "fp8", "sm89"), ("int8", "int8", "sm89"), ("nvfp4", "fp4", "sm120"),
])  # fmt: skip
def test_every_linear_is_low_precision_in_the_engine(
    case: str, kind: str, target: Any, quantized: Any, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, x = quantized(case)
    qcompile.export_onnx(qcompile.import_quantized(model, (x,)), tmp_path / "model.onnx")
    engine = qcompile.build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", target=target)
    gemms: dict[Format | str, int] = dict(engine.gemms)
    assert gemms.pop(kind) == 3
    assert not any(gemms.values())
