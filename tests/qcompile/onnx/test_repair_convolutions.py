"""Files with quantized convolutions, by nvidia-modelopt, ONNX Runtime and hand: repaired they compute the same, in as
few kernels as a file of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import qcompile
from tests.qcompile.frontends.resnet import IMAGES, recipe, resnet
from tests.qcompile.onnx import legacy
from tests.qcompile.onnx.modelopt_files import export_for_tensorrt, export_plainly

onnxruntime = pytest.importorskip("onnxruntime")
FLOAT = onnx.TensorProto.FLOAT


def run(path: Path, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def legacy_file(
    names: tuple[str, str], *, groups: int = 1, channels: bool = False, bias: bool = True, dims: int = 2
) -> onnx.ModelProto:
    """x -> Q -> DQ -> Conv of Q/DQ of a weight [8, 4 / groups, 3, ...], with one scale or one for each channel."""
    rng = np.random.default_rng(0)
    q, dq = names
    scale = rng.uniform(0.004, 0.01, 8) if channels else np.array(0.0072)
    axis = {"axis": 0} if channels else {}
    constants = {
        **{"weight": rng.standard_normal((8, 4 // groups, *[3] * dims)), "bias": rng.standard_normal(8)},
        **{"x_scale": np.array(0.0131), "w_scale": scale},
    }
    zeros = [
        legacy.tensor("x_zero", np.zeros((), legacy.FP8)),
        legacy.tensor("w_zero", np.zeros(scale.shape, legacy.FP8)),
    ]
    x_zero, w_zero = (["x_zero"], ["w_zero"]) if names == legacy.STANDARD_NAMES else ([], [])
    nodes = [
        helper.make_node(q, ["x", "x_scale", *x_zero], ["x_q"], name="x_quantize", domain="trt"),
        helper.make_node(dq, ["x_q", "x_scale"], ["x_dq"], name="x_dequantize", domain="trt"),
        helper.make_node(q, ["weight", "w_scale", *w_zero], ["w_q"], name="w_quantize", domain="trt", **axis),
        helper.make_node(dq, ["w_q", "w_scale"], ["w_dq"], name="w_dequantize", domain="trt", **axis),
        helper.make_node(
            "Conv", ["x_dq", "w_dq", *(["bias"] if bias else [])], ["c"], name="conv", pads=[1] * 2 * dims, group=groups
        ),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
    ]
    return legacy.model(
        nodes,
        [*(legacy.tensor(name, value.astype(np.float32)) for name, value in constants.items()), *zeros],
        {"x": (FLOAT, ["N", 4, *[6] * dims])},
        {"y": (FLOAT, ["N", 8, *[6] * dims])},
        value_info={"x_q": (onnx.TensorProto.UINT8, ["N", 4, *[6] * dims])},
    )


@pytest.mark.parametrize("names", [legacy.OLD_NAMES, legacy.STANDARD_NAMES], ids=["old", "standard"])
@pytest.mark.parametrize(
    "form", [{}, {"channels": True}, {"groups": 4, "channels": True, "bias": False}, {"dims": 1}, {"dims": 3}], ids=str
)
def test_legacy_quantizers_round_a_convolution(names: tuple[str, str], form: Any, tmp_path: Path) -> None:
    model = legacy_file(names, **form)
    onnx.save(model, tmp_path / "old.onnx")
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert all(check.passed for check in report.checks) and report.kept == {} and not report.notices
    x = np.random.default_rng(1).standard_normal((2, 4, *[6] * form.get("dims", 2))).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "new.onnx", x), legacy.reference(model, x), rtol=1e-5, atol=1e-5)
    new = onnx.load(tmp_path / "new.onnx")
    (codes,) = (i for i in new.graph.initializer if i.data_type == onnx.TensorProto.FLOAT8E4M3FN and len(i.dims) > 2)
    (dequantize,) = (node for node in new.graph.node if codes.name in node.input)
    axes = [a.i for a in dequantize.attribute if a.name == "axis"]
    assert axes == ([0] if form.get("channels") else []) and not report.transposes


def pooled(names: tuple[str, str], operator: str, taps: int, *, second: bool = False) -> onnx.ModelProto:
    """x -> Q -> DQ -> MaxPool -> a convolution, transposed perhaps, of Q/DQ of a weight [4, 4, taps, taps]."""
    q, dq = names
    constants = {
        "weight": np.random.default_rng(0).standard_normal((4, 4, taps, taps)),
        **{"x_scale": np.array(0.0131), "w_scale": np.array(0.0072)},
    }
    zero = ["zero"] if names == legacy.STANDARD_NAMES else []
    nodes = [
        helper.make_node(q, ["x", "x_scale", *zero], ["x_q"], name="x_quantize", domain="trt"),
        helper.make_node(dq, ["x_q", "x_scale"], ["x_dq"], name="x_dequantize", domain="trt"),
        helper.make_node(q, ["weight", "w_scale", *zero], ["w_q"], name="w_quantize", domain="trt"),
        helper.make_node(dq, ["w_q", "w_scale"], ["w_dq"], name="w_dequantize", domain="trt"),
        helper.make_node("MaxPool", ["x_dq"], ["p"], name="pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        helper.make_node(operator, ["p", "w_dq"], ["c"], name="conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["y" if not second else "a"], name="average"),
    ]
    if second:  # both read what is quantized
        nodes.append(helper.make_node("GlobalAveragePool", ["w_dq"], ["b"], name="weights"))
        nodes.append(helper.make_node("GlobalAveragePool", ["x_dq"], ["i"], name="input"))
        nodes.append(helper.make_node("Sum", ["a", "b", "i"], ["y"], name="sum"))
    return legacy.model(
        nodes,
        [
            *(legacy.tensor(name, value.astype(np.float32)) for name, value in constants.items()),
            legacy.tensor("zero", np.zeros((), legacy.FP8)),
        ],
        {"x": (FLOAT, [4, 4, 20, 20])},
        {"y": (FLOAT, [4, 4, 1, 1])},
    )


@pytest.mark.parametrize("names", [legacy.OLD_NAMES, legacy.STANDARD_NAMES], ids=["old", "standard"])
@pytest.mark.parametrize(("operator", "taps"), [("Conv", 7), ("ConvTranspose", 2), ("Conv", 3)])
@pytest.mark.parametrize("second", [False, True])
def test_fp8_that_has_no_kernel(names: tuple[str, str], operator: str, taps: int, second: bool, tmp_path: Path) -> None:
    """Weights are float, and a pooling comes before its quantizer, unless something else reads the same."""
    model = pooled(names, operator, taps, second=second)
    onnx.save(model, tmp_path / "old.onnx")
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert all(check.passed for check in report.checks) and report.kept == {}
    x = np.random.default_rng(1).standard_normal((4, 4, 20, 20)).astype(np.float32) * 3  # beyond the largest code
    np.testing.assert_allclose(run(tmp_path / "new.onnx", x), legacy.reference(model, x), rtol=1e-5, atol=1e-5)
    unfit = (operator, taps) != ("Conv", 3) and not second
    assert (len(report.floats), report.pools) == (int(unfit), int(not second))
    nodes = onnx.load(tmp_path / "new.onnx").graph.node
    assert sum(node.op_type == "DequantizeLinear" for node in nodes) == 2 - unfit
    (pool,) = (node for node in nodes if node.op_type == "MaxPool")
    assert (pool.input[0] == "x") is not second
    assert not qcompile.repair_onnx(tmp_path / "new.onnx", tmp_path / "again.onnx").changed


def modelopt(config: str, width: int = 16) -> Any:
    mtq = pytest.importorskip("modelopt.torch.quantization", reason="pip install nvidia-modelopt")
    return mtq.quantize(resnet(width), getattr(mtq, config), lambda m: m(IMAGES))


@pytest.mark.parametrize("config", ["FP8_DEFAULT_CFG", pytest.param("INT8_DEFAULT_CFG", marks=pytest.mark.slow)])
def test_a_plain_export_of_modelopt(config: str, tmp_path: Path) -> None:
    model = modelopt(config)
    export_plainly(model, IMAGES, tmp_path / "old.onnx", 17)
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert all(check.passed for check in report.checks) and len(report.folded) == 5 and not report.notices
    with torch.no_grad():
        want = model(IMAGES).numpy()
    assert relative(run(tmp_path / "new.onnx", IMAGES.numpy()), want) < 2e-3  # a tie falls to the other side


def test_modelopts_own_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It folds norms into codes, so that its file is the judge."""
    export_for_tensorrt(modelopt("FP8_DEFAULT_CFG"), IMAGES, tmp_path / "old.onnx", monkeypatch, dtype="fp32")
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert all(check.passed for check in report.checks) and report.kept == {}
    want = legacy.reference(onnx.load(tmp_path / "old.onnx"), IMAGES.numpy())
    assert relative(run(tmp_path / "new.onnx", IMAGES.numpy()), want) < 2e-3


class Reader:
    """Calibration data for ONNX Runtime."""

    def __init__(self) -> None:
        self.left = [{"x": IMAGES.numpy()}]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


FORMS = {
    "qdq, uint8": ("QDQ", "QUInt8", "QInt8", False, False),
    "qdq, int8 per channel": ("QDQ", "QInt8", "QInt8", True, True),
    "qdq, uint8 weights per channel": ("QDQ", "QUInt8", "QUInt8", True, False),
    "operators, uint8 per channel": ("QOperator", "QUInt8", "QInt8", True, False),
    "operators, int8": ("QOperator", "QInt8", "QInt8", False, False),
}


def by_onnxruntime(form: str, path: Path, width: int = 16, x: torch.Tensor = IMAGES) -> Path:
    import onnxruntime.quantization as quantization

    style, activation, weight, per_channel, symmetric = FORMS[form]
    torch.onnx.export(resnet(width), (x,), str(path / "float.onnx"), dynamo=True, verbose=False, input_names=["x"])
    reader: Any = Reader()
    reader.left = [{"x": x.numpy()}]
    quantization.quantize_static(
        path / "float.onnx", path / "old.onnx", reader, quant_format=quantization.QuantFormat[style],
        activation_type=quantization.QuantType[activation], weight_type=quantization.QuantType[weight],
        per_channel=per_channel, extra_options={"ActivationSymmetric": symmetric},
    )  # fmt: skip
    return path / "old.onnx"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_files_of_onnx_runtime(form: str, tmp_path: Path) -> None:
    old = by_onnxruntime(form, tmp_path)
    report = qcompile.repair_onnx(old, tmp_path / "new.onnx")
    assert all(check.passed for check in report.checks) and not report.notices
    assert relative(run(tmp_path / "new.onnx", IMAGES.numpy()), run(old, IMAGES.numpy())) < 2e-3


@pytest.mark.slow
def test_scales_that_are_measured_at_run_time_are_named(tmp_path: Path) -> None:
    """ConvInteger of `quantize_dynamic`: TensorRT measures none, and the file stays what it is."""
    import onnxruntime.quantization as quantization

    model, path = torch.nn.Conv2d(3, 8, 3, padding=1).eval(), str(tmp_path / "float.onnx")
    torch.onnx.export(model, (IMAGES,), path, dynamo=True, verbose=False, input_names=["x"])
    quantization.quantize_dynamic(tmp_path / "float.onnx", tmp_path / "old.onnx")
    assert any(node.op_type == "ConvInteger" for node in onnx.load(tmp_path / "old.onnx").graph.node)
    report = qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    assert any("measures scales at run time" in notice for notice in report.notices)
    np.testing.assert_array_equal(
        run(tmp_path / "new.onnx", IMAGES.numpy()), run(tmp_path / "old.onnx", IMAGES.numpy())
    )


@pytest.mark.slow
@pytest.mark.parametrize("source", ["FP8_DEFAULT_CFG", "INT8_DEFAULT_CFG", *FORMS])
def test_engines_have_as_few_kernels_as_those_of_our_own_files(source: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="it is the judge")
    x = IMAGES.repeat(1, 1, 2, 2)
    if source in FORMS:
        by_onnxruntime(source, tmp_path, 32, x)
    else:
        export_plainly(modelopt(source, 32), x, tmp_path / "old.onnx", 17)
    fmt = "fp8" if source.startswith("FP8") else "int8"
    rules = recipe(fmt, "per_tensor" if fmt == "fp8" else "per_channel")
    own = qcompile.quantize(resnet(32), (x,), recipe=rules, calibration=[(x,)], progress=False)
    qcompile.repair_onnx(tmp_path / "old.onnx", tmp_path / "new.onnx")
    ours, theirs = (
        qcompile.build_engine(model, None, target="sm89", progress=False) for model in (own, tmp_path / "new.onnx")
    )
    assert theirs.convolutions == ours.convolutions == {**dict.fromkeys(ours.convolutions, 0), fmt: 4}
    assert theirs.kernels <= ours.kernels
