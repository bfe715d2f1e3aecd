"""Models of torchao, pt2e and nvidia-modelopt through torch.compile: the numbers of `import_quantized`, and the tool's.

The frontends' own tests say how far a tool's eager mode may be away: ties, and activations that it scales otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from tests.qcompile.dynamo.support import Mlp, assert_same, compiled
from tests.qcompile.frontends.support import annotates_linear, dynamo_traces_modelopt, scales_rows_on_cpu

X = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
Make = Callable[[str], tuple[nn.Module, Tensor]]


def imported(model: nn.Module, x: Tensor) -> Tensor:
    """The judge: what import_quantized makes of `model` as it is now."""
    program = qcompile.import_quantized(model, (x,), dtype=x.dtype, progress=False)
    with torch.no_grad():
        result: Tensor = program.module()(x)
    return result


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((actual.float() - expected.float()).norm() / expected.float().norm()) < tolerance


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> Make:
    """Mlps that `quantize_` worked on; its hardware checks are in the way of quantizing, which runs anywhere."""
    api: Any = pytest.importorskip("torchao.quantization.quant_api")
    how: Any = pytest.importorskip("torchao.quantization.granularity")
    nvfp4: Any = pytest.importorskip("torchao.prototype.mx_formats.inference_workflow")
    monkeypatch.setattr(api, "_check_hardware_support", lambda *_: None)
    monkeypatch.setattr(nvfp4, "is_sm_at_least_100", lambda: True)
    fp8 = api.Float8DynamicActivationFloat8WeightConfig
    configs: dict[str, Callable[[], Any]] = {
        "fp8_tensor": lambda: fp8(granularity=how.PerTensor()),
        "fp8_row": lambda: fp8(granularity=how.PerRow()),
        "fp8_weight": api.Float8WeightOnlyConfig,
        "int8": api.Int8DynamicActivationInt8WeightConfig,
        "int8_weight": api.Int8WeightOnlyConfig,
        "nvfp4": lambda: nvfp4.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False),
        "nvfp4_weight": nvfp4.NVFP4WeightOnlyConfig,
        "int4": api.IntxWeightOnlyConfig,
    }

    def make(case: str) -> tuple[nn.Module, Tensor]:
        dtype = torch.bfloat16 if case in ("fp8_row", "nvfp4", "int4") else torch.float32
        model = Mlp(128).eval().to(dtype)
        api.quantize_(model, configs[case](), filter_fn=lambda module, _: isinstance(module, nn.Linear))
        return model, X.to(dtype)

    return make


TORCHAO = {"fp8_tensor": 1e-5, "fp8_weight": 1e-5, "int8": 5e-2, "int8_weight": 1e-5, "nvfp4_weight": 1e-5,
           "fp8_row": 5e-2, "nvfp4": None}  # fmt: skip


def everyday(cases: Iterable[str], *quick: str) -> list[Any]:
    """`cases`, of which all but the `quick` ones are slow tests."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.everyday(1)
@pytest.mark.parametrize("case", everyday(TORCHAO, "fp8_row", "nvfp4"))
def test_torchao(case: str, torchao: Make) -> None:
    if case == "fp8_row" and not scales_rows_on_cpu():
        pytest.skip("this torch has no kernel for torchao's own layers")
    (model, x), (other, _) = torchao(case), torchao(case)
    run, run_other = compiled(model, None, expect={"linear": 2}), compiled(other, None)
    with torch.no_grad():
        assert_same(run(x), imported(model, x))
        assert_same(run_other(x), imported(other, x))
        if (tolerance := TORCHAO[case]) is not None:  # torchao can run it here
            assert_near(run(x), model(x), tolerance)
        weight: Any = model.up.weight
        weight.qdata.copy_(weight.qdata.flip(0))
        assert_same(run(x), imported(model, x))
        model.load_state_dict(other.state_dict())
        assert_same(run(x), imported(other, x))
        model.up.weight = copy.deepcopy(other.up.weight)
        assert_same(run(x), imported(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fp8_weight", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_torchao_through_inductor(case: str, torchao: Make) -> None:
    model, x = torchao(case)
    run = compiled(model, None, target="inductor")
    with torch.no_grad():
        assert_same(run(x), imported(model, x))
        model.up.weight.qdata.copy_(model.up.weight.qdata.flip(0))  # type: ignore[operator, union-attr]
        assert_same(run(x), imported(model, x))


@pytest.mark.slow
def test_torchao_with_dynamic_batch_sizes(torchao: Make) -> None:
    model, x = torchao("fp8_tensor")
    run = compiled(model, None, dynamic=True)
    with torch.no_grad():
        for size in (2, 3, 4):
            assert_same(run(x[:size]), imported(model, x[:size]))


def test_weights_that_share_codes_and_layers_without_bias(torchao: Make) -> None:
    model, x = torchao("int8_weight")
    shared = nn.Sequential(model.up, model.down, model.up)
    shared[1].bias = None
    with torch.no_grad():
        assert_same(compiled(shared, None)(x), imported(shared, x))


def test_what_torchao_says_and_the_ir_cannot_is_named(torchao: Make) -> None:
    model, x = torchao("int4")
    with pytest.raises(Exception, match="up: torchao's IntxUnpackedToInt8Tensor is no format"):
        compiled(model, None)(x)
    model, x = torchao("fp8_weight")

    def transposed(x: Tensor) -> Tensor:
        return x @ model.up.weight.t()  # type: ignore[union-attr, operator]

    with pytest.raises(Exception, match=r"a weight of torchao, Float8Tensor, is given to"), torch.no_grad():
        compiled(transposed, None)(x)


@pytest.mark.parametrize("kind", everyday(["x86", "x86_unfolded", "xnnpack"], "x86"))
def test_pt2e(kind: str) -> None:
    quantize_pt2e: Any = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as inductor
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    def converted() -> Any:
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        if kind != "xnnpack":
            config = inductor.get_default_x86_inductor_quantization_config()
            quantizer = inductor.X86InductorQuantizer().set_global(config)
        prepared = quantize_pt2e.prepare_pt2e(torch.export.export(Mlp(128).eval(), (X,)).module(), quantizer)
        prepared(X)
        return quantize_pt2e.convert_pt2e(prepared, fold_quantize=kind != "x86_unfolded")

    if not annotates_linear(converted()):
        pytest.skip("torchao's quantizer leaves this torch's graph as it was")
    for model in (converted(), converted()):
        run = compiled(model, None, expect={"linear": 2})
        with torch.no_grad():
            assert_same(run(X), imported(model, X))
            assert_near(run(X), model(X), 2e-3)
            for buffer in model.buffers():
                if buffer.is_floating_point() and buffer.ndim:
                    buffer.mul_(2)
            assert_same(run(X), imported(model, X))


MODELOPT = ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", "INT8_SMOOTHQUANT_CFG", "FP8_PER_CHANNEL_PER_TOKEN_CFG",
            "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "NVFP4_DEFAULT_CFG"]  # fmt: skip


def modelopt(model: nn.Module, config: str, *args: Tensor, attention: bool = False) -> nn.Module:
    """`model` calibrated on `args`; FP4 cannot run on a CPU, so calibration passes it by."""
    mtq: Any = pytest.importorskip("modelopt.torch.quantization")
    import modelopt.torch.quantization.nn.modules.tensor_quantizer as quantizers

    from qcompile.frontends.modelopt import dynamo_ready

    if not dynamo_traces_modelopt():
        pytest.skip("Dynamo of this torch does not get through modelopt's layers")
    dynamo_ready()  # an earlier test may have loaded the back end before modelopt was imported
    settings = copy.deepcopy(getattr(mtq, config))
    if attention:
        fp8 = {"quantizer_name": "*[qkv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}
        settings["quant_cfg"] = [*settings["quant_cfg"], fp8]
    with pytest.MonkeyPatch.context() as patch:
        if config.startswith("NVFP4"):
            patch.setattr(quantizers, "dynamic_block_quant", lambda x, *_: x)
        result: nn.Module = mtq.quantize(model.eval(), settings, lambda m: m(*args))
    return result


@pytest.mark.parametrize("config", everyday(MODELOPT, "FP8_DEFAULT_CFG"))
def test_modelopt(config: str) -> None:
    model, other = (modelopt(Mlp(128), config, X) for _ in range(2))
    run, run_other = compiled(model, None, expect={"linear": 2}), compiled(other, None)
    with torch.no_grad():
        assert_same(run(X), imported(model, X))
        assert_same(run_other(X), imported(other, X))
        if not config.startswith("NVFP4"):
            assert_near(run(X), model(X), 1e-5)
        for name, buffer in model.named_buffers():
            if name.endswith("_amax"):
                buffer.mul_(0.5)
        model.up.weight.neg_()  # type: ignore[operator, union-attr]
        assert_same(run(X), imported(model, X))


@pytest.mark.parametrize("kind", everyday(["vit", "llama"]))
def test_modelopt_attention(kind: str) -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    if kind == "vit":
        settings = transformers.ViTConfig(image_size=64, patch_size=16, **sizes)
        model, x = transformers.ViTModel(settings, add_pooling_layer=False), torch.randn(2, 3, 64, 64)
    else:
        settings = transformers.LlamaConfig(num_key_value_heads=1, vocab_size=100, use_cache=False, **sizes)
        model, x = transformers.LlamaForCausalLM(settings), torch.randint(0, 100, (2, 16))
    model = modelopt(model, "FP8_DEFAULT_CFG", x, attention=True)
    program = qcompile.import_quantized(model, (x,), dtype=torch.float32)
    with torch.no_grad():
        assert_same(compiled(model, None, expect={"attention": 1})(x)[0], next(iter(program.module()(x).values())))


@pytest.mark.slow
def test_modelopt_with_gradients_on_and_through_inductor() -> None:
    for config in ("INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"):
        model = modelopt(Mlp(128), config, X)
        assert_same(compiled(model, None)(X), imported(model, X))
    with torch.no_grad():
        assert_same(compiled(model, None, target="inductor")(X), imported(model, X))


@pytest.mark.everyday(1)
@pytest.mark.parametrize("padded", [False, True])
def test_modelopt_in_encoder_layers_of_torch_without_gradients(padded: bool) -> None:
    """torch's one operator for such a layer reads the weights past their quantizers, in eager mode, too."""
    layer, x = nn.TransformerEncoderLayer(128, 4, 128, batch_first=True), X.unflatten(0, (2, 2))
    model = modelopt(nn.TransformerEncoder(layer, 1) if padded else layer, "FP8_DEFAULT_CFG", x)
    masks = {"src_key_padding_mask": torch.tensor([[False, True], [False, False]])} if padded else {}
    seen = ~masks["src_key_padding_mask"] if padded else slice(None)
    run, fast = compiled(model, None, expect={"linear": 2}), torch.backends.mha.get_fastpath_enabled
    want = model(x, **masks)[seen]
    with torch.no_grad():
        assert_near(run(x, **masks)[seen], want, 1e-5)
        assert float((model(x, **masks)[seen] - want).norm() / want.norm()) > 1e-3, "torch mended it"
    assert fast()


def test_modelopt_elsewhere_is_as_it_was() -> None:
    """What Dynamo sees of integer quantizers has their values and their gradients, whoever compiles."""
    model = modelopt(Mlp(128), "INT8_DEFAULT_CFG", X)
    compiled(model, None)(X)
    want, found = model(X), torch.compile(model, backend="aot_eager")(X)
    torch.testing.assert_close(found, want)
    weight = model.get_parameter("up.weight")
    gradients = [torch.autograd.grad(result.sum(), weight)[0] for result in (found, want)]
    torch.testing.assert_close(*gradients)


def test_a_format_of_modelopt_that_the_ir_cannot_say_is_named() -> None:
    model = modelopt(Mlp(128), "MXFP4_DEFAULT_CFG", X)
    with pytest.raises(Exception, match=r"up.(input|weight)_quantizer: nvidia-modelopt quantizes to 4 bits"):
        compiled(model, None)(X)
