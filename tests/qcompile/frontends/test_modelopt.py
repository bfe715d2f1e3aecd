"""Models of nvidia-modelopt through `import_quantized`: its fake-quantized tensors, layer by layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from passes.base import run_pipeline
from passes.canonicalize.modelopt import ModeloptToQdq
from passes.constants import constant
from passes.graph import calls
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE, dequantize
from passes.program import unlift
from qcompile.capture import capture
from qcompile.errors import CaptureError
from qcompile.frontends import modelopt

mtq: Any = pytest.importorskip("modelopt.torch.quantization")
transformers: Any = pytest.importorskip("transformers")

PIXELS = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 100, (2, 64), generator=torch.Generator().manual_seed(0))
ATTENTION_FP8 = {"quantizer_name": "*[qkv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}
NO_NORMS = {"quantizer_name": "*layernorm*", "enable": False}


def config(name: str, *more: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = copy.deepcopy(getattr(mtq, name))
    result["quant_cfg"] = [*result["quant_cfg"], *more]
    return result


def vit() -> nn.Module:
    torch.manual_seed(0)
    settings = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=96, patch_size=16
    )
    return transformers.ViTModel(settings, add_pooling_layer=False).eval()  # type: ignore[no-any-return]


def llama() -> nn.Module:
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
        vocab_size=100, head_dim=32, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(settings).eval()  # type: ignore[no-any-return]


def quantized(model: nn.Module, settings: dict[str, Any], *args: Tensor, monkeypatch: Any = None) -> nn.Module:
    """`model` calibrated on `args`; FP4 cannot run on a CPU, so calibration passes it by."""
    if monkeypatch is not None:
        import modelopt.torch.quantization.nn.modules.tensor_quantizer as quantizers

        monkeypatch.setattr(quantizers, "dynamic_block_quant", lambda x, *_: x)
    result: nn.Module = mtq.quantize(copy.deepcopy(model), settings, lambda m: m(*args))
    if monkeypatch is not None:
        monkeypatch.undo()
    return result


def canonical(model: nn.Module, *args: Tensor) -> Any:
    with modelopt.capture_ready(model):
        gm = unlift(capture(model, args))
    run_pipeline((ModeloptToQdq,), gm)
    return gm


def recorded(model: nn.Module, *args: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What went into and came out of each quantizer that is on."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        q.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: (inputs[0], output)}))
        for name, q in modelopt._quantizers(model)
        if q.is_enabled
    ]
    with torch.no_grad():
        model(*args)
    for handle in handles:
        handle.remove()
    return {name: (x.detach(), y.detach()) for name, (x, y) in found.items()}


@pytest.mark.everyday(1)
@pytest.mark.parametrize("name", ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG"])
def test_every_quantizer_gives_what_modelopts_gives(name: str) -> None:
    more = (ATTENTION_FP8,) if name.startswith("FP8") else ()
    model = quantized(vit(), config(name, *more), PIXELS)
    seen = recorded(model, PIXELS)
    gm = canonical(model, PIXELS)
    compared = 0
    for node in calls(gm.graph, DEQUANTIZE):
        x, want = seen[node.meta["custom"]["quantizer"]]
        scale, options = constant(gm, node.args[1]), dict(node.kwargs)
        assert scale is not None
        smooth = model.get_submodule(node.meta["custom"]["quantizer"]).pre_quant_scale
        x = x if smooth is None else x * smooth
        codes = QUANTIZE(x, scale, format=options["format"])
        got = DEQUANTIZE(codes, scale, **options)
        differ = ~torch.isclose(got, want, rtol=1e-5, atol=0)
        assert float(differ.float().mean()) < 1e-5 or int(differ.sum()) <= 1, node.meta["custom"]["quantizer"]
        compared += 1
    assert compared == len(seen) >= 13 * 2


def test_the_model_is_not_changed() -> None:
    import modelopt.torch.quantization.utils as utils

    model = quantized(vit(), config("INT8_DEFAULT_CFG"), PIXELS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = {name: dict(q.__dict__) for name, q in modelopt._quantizers(model)}
    with torch.no_grad():
        want = model(PIXELS)[0]
    qcompile.import_quantized(model, (PIXELS,))
    assert not utils.is_torch_export_mode()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: dict(q.__dict__) for name, q in modelopt._quantizers(model)} == attributes
    with torch.no_grad():
        assert torch.equal(model(PIXELS)[0], want)


@pytest.mark.slow
def test_attention_of_a_vit_and_of_grouped_queries_is_fused() -> None:
    program = qcompile.import_quantized(quantized(vit(), config("FP8_DEFAULT_CFG", ATTENTION_FP8), PIXELS), (PIXELS,))
    assert sum(1 for _ in calls(program.graph, ATTENTION)) == 2
    model = quantized(llama(), config("FP8_DEFAULT_CFG", ATTENTION_FP8), IDS)
    program = qcompile.import_quantized(model, (IDS,))
    attentions = list(calls(program.graph, ATTENTION))
    assert [tuple(node.args[1].meta["val"].shape) for node in attentions] == [(2, 2, 64, 32)] * 2  # type: ignore[union-attr]
    assert program.state_dict["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("name", ["FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"])
def test_fp8_of_other_granularity_computes_the_same(name: str) -> None:
    x = torch.randn(4, 200)
    model = quantized(nn.Sequential(nn.Linear(200, 136), nn.Linear(136, 8, bias=False)), config(name), x)
    program = qcompile.import_quantized(model, (x,), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert [program.state_dict[f"{i}.weight"].dtype for i in range(2)] == [torch.float8_e4m3fn] * 2


def test_quantizers_that_are_off_are_not_its_own() -> None:
    assert not modelopt.is_quantized(vit())
    model = quantized(vit(), {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None}, PIXELS)
    assert not modelopt.is_quantized(model)


def test_other_formats_are_named() -> None:
    model = quantized(vit(), config("MXFP4_DEFAULT_CFG"), PIXELS)
    with pytest.raises(qcompile.QCompileError, match="_quantizer: nvidia-modelopt quantizes to 4 bits"):
        qcompile.import_quantized(model, (PIXELS,))


def test_int4_weights_have_its_scales_and_codes() -> None:
    """Its own scales; codes up to ties, as it multiplies by 7 / amax and the IR divides by amax / 7."""
    x = torch.randn(4, 256)
    model = quantized(
        nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 9)), config("INT4_BLOCKWISE_WEIGHT_ONLY_CFG"), x
    )
    program = qcompile.import_quantized(model, (x,), dtype=torch.float32)
    for layer, columns in (("0", 256), ("1", 128)):
        scale = program.state_dict[f"{layer}.weight_scale"]
        amax = model.get_submodule(f"{layer}.weight_quantizer").amax
        assert torch.equal(scale, amax.float().reshape(-1, columns // 128) / 7)
        with torch.no_grad():
            theirs = model.get_submodule(f"{layer}.weight_quantizer")(model.get_parameter(f"{layer}.weight"))
        ours = dequantize(program.state_dict[f"{layer}.weight"], scale, format="int4_128", dtype=torch.float32)
        assert float((theirs - ours).abs().gt(1e-6).float().mean()) < 1e-3
    with pytest.raises(qcompile.QCompileError, match="INT4 is for weights, with an amax for each group of a row"):
        ragged = quantized(nn.Sequential(nn.Linear(200, 128)), config("INT4_BLOCKWISE_WEIGHT_ONLY_CFG"), x[:, :200])
        qcompile.import_quantized(ragged, (x[:, :200],))


def test_weights_that_are_compressed_are_an_error() -> None:
    model = quantized(nn.Sequential(nn.Linear(32, 32)), config("FP8_DEFAULT_CFG"), torch.randn(2, 32))
    mtq.compress(model)
    with pytest.raises(CaptureError, match=r"0.weight_quantizer: weights compressed"), modelopt.capture_ready(model):
        pass


def test_nvfp4_is_read_with_its_global_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(llama(), config("NVFP4_DEFAULT_CFG"), IDS, monkeypatch=monkeypatch)
    program = qcompile.import_quantized(model, (IDS,))
    layer = "model.layers.0.self_attn.q_proj"
    quantizer = dict(modelopt._quantizers(model))[f"{layer}.weight_quantizer"]
    assert torch.equal(program.state_dict[f"{layer}.weight_global_scale"], quantizer.amax.float() / (6 * 448))
    assert program.state_dict[f"{layer}.weight"].dtype == torch.uint8


def _engine(program: Any, target: Any, path: Path) -> Any:
    qcompile.export_onnx(program, path / "model.onnx")
    return qcompile.build_engine(path / "model.onnx", path / "model.engine", target=target)


@pytest.mark.slow
def test_an_fp8_vit_fuses_as_well_as_our_recipe(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = quantized(vit(), config("FP8_DEFAULT_CFG", ATTENTION_FP8, NO_NORMS), PIXELS)
    theirs = _engine(qcompile.import_quantized(model, (PIXELS,)), "sm89", tmp_path)
    own = qcompile.quantize(vit(), (PIXELS,), recipe="fp8", calibration=[PIXELS], progress=False)
    ours = _engine(own, "sm89", tmp_path)
    assert (theirs.attention.fp8, theirs.gemms["fp8"]) == (ours.attention.fp8, ours.gemms["fp8"]) == (2, 9)
    assert theirs.kernels <= ours.kernels


@pytest.mark.slow
def test_an_nvfp4_llama_fuses_as_well_as_our_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = quantized(llama(), config("NVFP4_DEFAULT_CFG", ATTENTION_FP8), IDS, monkeypatch=monkeypatch)
    theirs = _engine(qcompile.import_quantized(model, (IDS,)), "sm120", tmp_path)
    own = qcompile.quantize(
        llama(), (IDS,), recipe="nvfp4_fp8_attention",
        calibration=[IDS], progress=False,
    )  # fmt: skip
    ours = _engine(own, "sm120", tmp_path)
    assert (theirs.attention.fp8, theirs.gemms["fp4"]) == (ours.attention.fp8, ours.gemms["fp4"]) == (2, 8)
    assert theirs.kernels <= ours.kernels
