"""Models with convolutions that other tools quantized: their numbers, codes and layers, and our kernels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from passes.graph import aten, calls
from passes.ir import DEQUANTIZE
from qcompile.errors import CaptureError
from qcompile.report.program import ProgramReport
from tests.qcompile.frontends.resnet import IMAGES, LAYERS, recipe, resnet
from tests.qcompile.frontends.support import annotates_linear

mtq: Any = pytest.importorskip("modelopt.torch.quantization")
pt2e: Any = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
quant_api: Any = pytest.importorskip("torchao.quantization.quant_api")


def by_modelopt(config: str, model: nn.Module, x: Tensor = IMAGES) -> Any:
    return mtq.quantize(copy.deepcopy(model), copy.deepcopy(getattr(mtq, config)), lambda m: m(x))


def by_pt2e(quantizer: str, model: nn.Module, x: Tensor = IMAGES) -> Any:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as inductor
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    if quantizer == "x86":
        chosen = inductor.X86InductorQuantizer().set_global(inductor.get_default_x86_inductor_quantization_config())
    else:
        per_channel = get_symmetric_quantization_config(is_per_channel=quantizer == "xnnpack")
        chosen = XNNPACKQuantizer().set_global(per_channel)
    prepared = pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), chosen)
    prepared(x)
    return pt2e.convert_pt2e(prepared)


TOOLS = {
    "modelopt-fp8": (lambda *a: by_modelopt("FP8_DEFAULT_CFG", *a), "fp8", "per_tensor"),
    "modelopt-int8": (lambda *a: by_modelopt("INT8_DEFAULT_CFG", *a), "int8", "per_channel"),
    "pt2e-x86": (lambda *a: by_pt2e("x86", *a), "int8", "per_channel"),
    "pt2e-xnnpack": (lambda *a: by_pt2e("xnnpack", *a), "int8", "per_channel"),
    "pt2e-xnnpack-tensor": (lambda *a: by_pt2e("xnnpack-tensor", *a), "int8", "per_tensor"),
}


@pytest.mark.everyday(3)
@pytest.mark.parametrize("tool", TOOLS)
def test_the_numbers_are_those_of_the_tool(tool: str) -> None:
    make, fmt, _ = TOOLS[tool]
    model = make(resnet())
    if tool == "pt2e-x86" and not annotates_linear(model):
        pytest.skip("torchao's quantizer leaves this torch's graph as it was")
    with torch.no_grad():
        want = model(IMAGES)
    program = qcompile.import_quantized(model, (IMAGES,), dtype=torch.float32, progress=False)
    # a tie falls to the other side here and there
    assert float((program.module()(IMAGES) - want).norm() / want.norm()) < 5e-3
    report = ProgramReport.of(program)
    assert report.quantized == dict.fromkeys(LAYERS, fmt) and not report.unquantized
    for layer in calls(program.graph, aten.convolution.default):
        assert all(operand.target is DEQUANTIZE for operand in layer.args[:2])  # type: ignore[union-attr]
    for name in LAYERS:
        assert program.state_dict[f"{name}.weight"].itemsize == 1


def test_codes_of_modelopt_stay_where_norms_are_folded() -> None:
    """Numbers as modelopt has them behind its quantizer, channel by channel, from codes times scales."""
    model = by_modelopt("INT8_DEFAULT_CFG", resnet())
    program = qcompile.import_quantized(model, (IMAGES,), dtype=torch.float32, progress=False)
    state = program.state_dict
    assert not any(node.target is aten._native_batch_norm_legit_no_training.default for node in program.graph.nodes)
    for name, norm in (("stem", "norm"), ("block.first", "block.first_norm"), ("block.skip", "block.skip_norm")):
        layer, behind = model.get_submodule(name), model.get_submodule(norm)
        amax = layer.weight_quantizer.amax
        codes = torch.round(layer.weight_quantizer(layer.weight) * 127 / amax)
        factor = (behind.weight / (behind.running_var + behind.eps).sqrt()).reshape(-1, 1, 1, 1)
        assert bool((factor < 0).any()) and bool((factor > 0).any())
        assert torch.equal(state[f"{name}.weight"].float(), codes * factor.sign())
        torch.testing.assert_close(state[f"{name}.weight_scale"], amax / 127 * factor.abs())


def test_convolutions_of_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here runs torchao's own convolution; its weights and its quantizer of the input do."""
    from torchao.quantization.granularity import PerTensor

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda *_: None)
    config = quant_api.Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor())
    model, judge = resnet(), resnet()
    quant_api.quantize_(model, config, filter_fn=lambda module, _: isinstance(module, (nn.Conv2d, nn.Linear)))
    for name, layer in judge.named_modules():
        own: Any = model.get_submodule(name)
        if type(getattr(own, "weight", None)).__name__ == "Float8Tensor":
            layer.weight = nn.Parameter(own.weight.dequantize(), requires_grad=False)
            quantize = type(own.weight).from_hp
            layer.register_forward_pre_hook(lambda _, x, q=quantize: (q(x[0], granularity=PerTensor()).dequantize(),))
    program = qcompile.import_quantized(model, (IMAGES,), dtype=torch.float32, progress=False)
    want = judge(IMAGES)
    assert float((program.module()(IMAGES) - want).norm() / want.norm()) < 5e-3
    report = ProgramReport.of(program)
    assert report.quantized == dict.fromkeys(LAYERS[1:], "fp8")
    assert report.unquantized == {"stem": "convolution"}  # torchao leaves three channels as they are
    assert isinstance(model.block.first, nn.Conv2d) and type(model.block.first) is nn.Conv2d


@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_padding_of_torchao(padding: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.quantization.granularity import PerTensor

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda *_: None)
    config = quant_api.Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor())
    torch.manual_seed(0)
    x, model = torch.randn(1, 16, 6, 6), nn.Sequential(nn.Conv2d(16, 16, (3, 2), padding=padding, padding_mode=mode))
    judge = copy.deepcopy(model)
    quant_api.quantize_(model, config, filter_fn=lambda module, _: isinstance(module, nn.Conv2d))
    judge[0].weight = nn.Parameter(model[0].weight.dequantize())
    want = judge(type(model[0].weight.data).from_hp(x, granularity=PerTensor()).dequantize())
    program = qcompile.import_quantized(model, (x,), dtype=torch.float32, progress=False)
    torch.testing.assert_close(program.module()(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", ["Float8WeightOnlyConfig", "Int8WeightOnlyConfig"])
def test_other_weights_of_torchao_are_refused_by_name(config: str) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3)).eval()
    try:
        quant_api.quantize_(
            model, getattr(quant_api, config)(), filter_fn=lambda module, _: isinstance(module, nn.Conv2d)
        )
    except (AssertionError, ValueError, RuntimeError, NotImplementedError):
        pytest.skip("this torchao does not quantize convolutions so")
    with pytest.raises(CaptureError, match="0: a convolution"):
        qcompile.import_quantized(model, (torch.randn(1, 16, 6, 6),))


CASES = {
    "1-D": (lambda: nn.Conv1d(16, 16, 3, padding=1), (16, 12), "convolution", None),
    "3-D": (lambda: nn.Conv3d(16, 16, 3, padding=1), (16, 4, 4, 4), "convolution", None),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16), (16, 6, 6), "convolution", None),
    "reflect": (lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), (16, 6, 6), "convolution", None),
    "same": (lambda: nn.Conv2d(16, 16, 4, padding="same"), (16, 6, 6), "convolution", None),
    "wide": (lambda: nn.Conv2d(16, 16, 7, padding=3), (16, 8, 8), "convolution", "at most 32 elements"),
    "transposed": (lambda: nn.ConvTranspose2d(16, 16, 2, 2), (16, 6, 6), "transposed_convolution", "no target"),
}


@pytest.mark.everyday(3)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("config", ["FP8_DEFAULT_CFG", pytest.param("INT8_DEFAULT_CFG", marks=pytest.mark.slow)])
def test_every_kind_of_convolution(name: str, config: str, tmp_path: Path) -> None:
    make, sizes, kind, reason = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(2, *sizes)
    model = by_modelopt(config, nn.Sequential(make(), nn.ReLU()).eval(), x)
    program = qcompile.import_quantized(model, (x,), dtype=torch.float32, progress=False)
    with torch.no_grad():
        want = model(x)
    assert float((program.module()(x) - want).norm() / want.norm()) < 2e-3
    report = qcompile.export_onnx(program, tmp_path / "model.onnx")
    if reason is None or (name == "wide" and config.startswith("INT8")):
        assert report.quantized == {"0": config[:4].strip("_").lower()} and not report.unquantized
        return
    assert report.unquantized == {"0": kind} and reason in report.reasons["0"]
    assert not any(op in report.ops for op in ("QuantizeLinear", "DequantizeLinear"))  # TensorRT would keep them


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_engines_have_as_few_kernels_as_those_of_our_own_files(tool: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    make, fmt, granularity = TOOLS[tool]
    x = IMAGES.repeat(1, 1, 2, 2)
    own = qcompile.quantize(resnet(32), (x,), recipe=recipe(fmt, granularity), calibration=[(x,)], progress=False)
    imported = qcompile.import_quantized(make(resnet(32), x), (x,), progress=False)
    engines = [qcompile.build_engine(program, None, target="sm89", progress=False) for program in (own, imported)]
    for engine in engines:
        assert engine.convolutions == {**dict.fromkeys(engine.convolutions, 0), fmt: 4}
        assert engine.gemms[fmt] == 1
    assert engines[1].kernels <= engines[0].kernels


def test_a_norm_without_a_scale_for_each_channel_stays() -> None:
    """One for each channel would make TensorRT write float32 behind each convolution."""
    program = qcompile.import_quantized(by_modelopt("FP8_DEFAULT_CFG", resnet()), (IMAGES,), progress=False)
    scales = [program.state_dict[f"{name}.weight_scale"] for name in LAYERS]
    assert all(scale.numel() == 1 for scale in scales)
    assert sum(1 for node in program.graph.nodes if "batch_norm" in str(node.target)) == 4
