"""Integer quantization as other tools write it becomes what TensorRT takes, with the numbers of ONNX Runtime."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import qcompile
from qcompile.engine.graph import OnnxGraph
from qcompile.engine.patterns import find_gemms
from qcompile.errors import VerificationError
from qcompile.onnx.foreign import verify_foreign

RNG = np.random.default_rng(0)
INT8, UINT8 = np.int8, np.uint8
MATRIX, IMAGE = [16, 64], [1, 16, 9, 9]
MICROSOFT = "com.microsoft"


class Model(NamedTuple):
    """Nodes from x to y; `kernels`: how many GEMMs and convolutions its quantizers ask for, by type; `in_reference`:
    whether onnx.reference has what is left; `rank`: of y.
    """

    nodes: list[onnx.NodeProto]
    constants: dict[str, Any]
    kernels: dict[str, int]
    shape: list[int] = MATRIX
    in_reference: bool = True
    rank: int = 2
    opset: int = 21

    def save(self, path: Path) -> Path:
        infos = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * self.rank),
        ]
        tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "g", infos[:1], infos[1:], tensors)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
        return path


def q(x: str, y: str, name: str = "s", **given: Any) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [x, name, f"{name}_z"], [y], name=f"{y}_node", **given)


def dq(x: str, y: str, name: str, **given: Any) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [x, name, f"{name}_z"], [y], name=f"{y}_node", **given)


def node(op_type: str, *inputs: str, y: str = "y", **given: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, list(inputs), [y], name=f"{op_type}_{y}", **given)


def point(name: str, scale: Any, zero: Any, dtype: Any) -> dict[str, Any]:
    scale = np.asarray(scale, np.float32)
    return {name: scale, f"{name}_z": np.broadcast_to(np.asarray(zero), scale.shape).astype(dtype)}


def codes(low: int, high: int, dtype: Any, shape: tuple[int, ...] = (64, 48)) -> Any:
    return RNG.integers(low, high + 1, shape).astype(dtype)


def ramp(count: int) -> Any:
    return np.linspace(0.01, 0.02, count, dtype=np.float32)


def product(
    activation: tuple[int, Any] = (7, INT8), weight: Any = None, point_of_weight: Any = None, **given: Any
) -> Model:
    """x -> Q -> DQ -> MatMul with a weight of [64, 48], the DQ of which is along axis 1."""
    weight = codes(-60, 60, INT8) if weight is None else weight
    constants = {"w": weight, **point("s", 0.03, *activation), **(point_of_weight or point("t", 0.01, 0, weight.dtype))}
    nodes = [q("x", "xq", **given), dq("xq", "xd", "s", **given), dq("w", "wd", "t", axis=1, **given)]
    return Model([*nodes, node("MatMul", "xd", "wd")], constants, {"int8": 1})


def gemm() -> Model:
    """With a bias in INT32, an output scale, and a weight [N, K] per channel."""
    constants = {
        **{"w": codes(-127, 127, INT8, (48, 64)), "b": codes(-9000, 9000, np.int32, (48,))},
        **{**point("s", 0.03, -9, INT8), **point("t", ramp(48), 0, INT8), **point("b_s", ramp(48) * 0.03, 0, np.int32)},
    }
    nodes = [q("x", "xq"), dq("xq", "xd", "s"), dq("w", "wd", "t", axis=0), dq("b", "bd", "b_s", axis=0)]
    return Model([*nodes, node("Gemm", "xd", "wd", "bd", transB=1, alpha=0.5, beta=2.0)], constants, {"int8": 1})


def convolution(weight: Any, zero: int, groups: int = 1, **pads: Any) -> Model:
    """Pads, strides, and the product of a Relu, as uint8 with a zero point of 3."""
    constants = {"w": weight, **point("s", 0.02, 3, UINT8), **point("t", 0.01, zero, weight.dtype)}
    pads = pads or {"pads": [1, 0, 2, 1]}
    conv = node("Conv", "xd", "wd", kernel_shape=list(weight.shape[2:]), strides=[2, 1], group=groups, **pads)
    nodes = [node("Relu", "x", y="r"), q("r", "xq"), dq("xq", "xd", "s"), dq("w", "wd", "t")]
    return Model([*nodes, conv], constants, {"int8": 1 + bool(zero % 128)}, IMAGE, rank=4)


def of_activations() -> Model:
    """x @ x.T, where the codes of one side pass a Transpose, and both have zero points."""
    nodes = [q("x", "a"), dq("a", "ad", "s"), q("x", "b", "t"), node("Transpose", "b", y="bt", perm=[1, 0])]
    constants = {**point("s", 0.03, 100, UINT8), **point("t", 0.02, -20, INT8)}
    return Model([*nodes, dq("bt", "bd", "t"), node("MatMul", "ad", "bd")], constants, {"int8": 1})


def pooled() -> Model:
    """Codes of uint8 that pass MaxPool and Concat, and are read by something else than a GEMM."""
    nodes = [q("x", "a"), node("MaxPool", "a", y="p", kernel_shape=[3, 3]), node("Concat", "p", "p", y="c", axis=1)]
    constants = {**point("s", 0.02, 131, UINT8), "one": INT8(7), **point("t", 0.1, 0, INT8)}
    return Model(
        [*nodes, dq("c", "d", "s"), dq("one", "n", "t"), node("Div", "d", "n")],
        constants,
        {},
        IMAGE,
        in_reference=False,
        rank=4,
    )


def qoperators() -> Model:
    """The chain QLinearConv, QLinearAdd, QLinearGlobalAveragePool, QGemm."""
    constants = {
        **{"w": codes(-99, 99, INT8, (32, 16, 3, 3)), "b": codes(-900, 900, np.int32, (32,))},
        **{"v": codes(-99, 99, INT8, (32, 24)), "c": codes(-900, 900, np.int32, (24,))},
        **{**point("s", 0.03, -4, INT8), **point("t", ramp(32), 0, INT8), **point("o", 0.2, 3, INT8)},
        **{**point("g", 0.05, 1, INT8), **point("u", 0.01, 0, INT8)},
    }

    def triples(*names: str) -> list[str]:
        return [
            part for codes, name in zip(names[::2], names[1::2], strict=True) for part in (codes, name, f"{name}_z")
        ]

    nodes = [
        q("x", "xq"),
        node("QLinearConv", *triples("xq", "s", "w", "t"), "o", "o_z", "b", y="h", pads=[1, 1, 1, 1]),
        node("QLinearAdd", *triples("h", "o", "h", "o"), "o", "o_z", y="a", domain=MICROSOFT),
        node("QLinearGlobalAveragePool", *triples("a", "o"), "g", "g_z", y="m", domain=MICROSOFT),
        node("Flatten", "m", y="f"),
        node("QGemm", *triples("f", "g", "v", "u"), "c", "o", "o_z", y="r", domain=MICROSOFT),
        dq("r", "y", "o"),
    ]
    return Model(nodes, constants, {"int8": 2}, IMAGE)


def nbits(bits: int, zero: str) -> Model:
    """K of 64 in blocks of 16, N of 48; codes of 4 bits lie two in a byte."""
    packed = codes(0, 255, UINT8, (48, 4, 16 * bits // 8))
    points = {"": {}, "stored": {"z": codes(0, 255, UINT8, (48, 4 * bits // 8))}}[zero]
    sizes = {"K": 64, "N": 48, "bits": bits, "block_size": 16}
    made = node("MatMulNBits", "x", "w", "s", *points, domain=MICROSOFT, **sizes)
    constants = {"w": packed, "s": RNG.uniform(0.01, 0.02, (48, 4)).astype(np.float32), **points}
    return Model([made], constants, {"int4": 1} if bits == 4 else {})


def clipped() -> Model:
    made = product()
    made.nodes[2].input[0] = "wc"
    return made._replace(nodes=[node("Clip", "w", "low", "high", y="wc"), *made.nodes], constants=made.constants | {
        "low": INT8(-50), "high": INT8(50)
    })  # fmt: skip


def float_weight() -> Model:
    made = product(weight=codes(-60, 60, np.float32) / 99, point_of_weight=point("t", ramp(48), 5, INT8))
    made.nodes[2].input[0] = "wq"
    return made._replace(nodes=[q("w", "wq", "t", axis=1), *made.nodes])


KINDS = {
    "int8 zero point": product,
    "int32 bias, zero point into it": gemm,
    "uint8 activations": lambda: product((250, UINT8)),
    "uint8 weights": lambda: product((0, UINT8), codes(68, 188, UINT8), point("t", ramp(48), 128, UINT8)),
    "uint8 weights of 9 bits": lambda: product((9, UINT8), codes(0, 255, UINT8), point("t", ramp(48), 3, UINT8)),
    "int4 beside int8": lambda: product((0, INT8), codes(-8, 7, ml_dtypes.int4)),
    "uint4 beside int8": lambda: product((0, INT8), codes(0, 15, ml_dtypes.uint4), point("t", 0.1, 3, ml_dtypes.uint4)),
    "negative scales": lambda: product((0, INT8), point_of_weight=point("t", ramp(48) - 0.015, 0, INT8)),
    "negative scales at -128": lambda: product((0, INT8), codes(-128, -9, INT8), point("t", ramp(48) - 0.015, 0, INT8)),
    "com.microsoft": lambda: product((200, UINT8), domain=MICROSOFT),
    "float weight": float_weight,
    "clip": clipped,
    "padded convolution": lambda: convolution(codes(-99, 99, INT8, (32, 16, 3, 3)), 0),
    "convolution of the same size": lambda: convolution(codes(-99, 99, INT8, (32, 16, 4, 3)), 0, auto_pad="SAME_UPPER"),
    "uint8 convolution of the same size": lambda: convolution(
        codes(1, 255, UINT8, (32, 4, 2, 4)), 128, groups=4, auto_pad="SAME_LOWER"
    ),
    "depthwise of 9 bits": lambda: convolution(codes(0, 255, UINT8, (16, 1, 3, 3)), 9, groups=16),
    "product of activations": of_activations,
    "opset 11": lambda: of_activations()._replace(opset=11, in_reference=False),
    "codes through MaxPool and Concat, a single number": pooled,
    "operators on codes": qoperators,
    "nbits 4": lambda: nbits(4, ""),
    "nbits 4, zero points": lambda: nbits(4, "stored"),
    "nbits 8, zero points": lambda: nbits(8, "stored"),
}


def run(path: Path, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_stay_and_no_check_fails(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind]()
    old = model.save(tmp_path / "old.onnx")
    report = qcompile.repair_onnx(old, tmp_path / "new.onnx")
    assert report.changed and all(check.passed for check in report.checks) and not report.notices
    assert all(check.passed for check in verify_foreign(tmp_path / "new.onnx"))
    x = np.random.default_rng(1).standard_normal(model.shape).astype(np.float32)
    expected = run(old, x)
    near = {"rtol": 0, "atol": 2e-6 * float(np.abs(expected).max())}
    np.testing.assert_allclose(run(tmp_path / "new.onnx", x), expected, **near)
    if model.in_reference:
        (result,) = ReferenceEvaluator(str(tmp_path / "new.onnx")).run(None, {"x": x})
        np.testing.assert_allclose(result, expected, **near)
    assert not qcompile.repair_onnx(tmp_path / "new.onnx", tmp_path / "again.onnx").changed


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tensorrt_runs_it_in_the_kernels_that_it_asks_for(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="it is the judge")
    model = KINDS[kind]()
    qcompile.repair_onnx(model.save(tmp_path / "old.onnx"), tmp_path / "new.onnx")
    built = qcompile.build_engine(tmp_path / "new.onnx", target="sm89", progress=False)
    assert not model.kernels or not built.not_low_precision
    for precision, count in model.kernels.items():
        assert built.gemms[precision] + built.convolutions[precision] == count


@pytest.mark.parametrize(
    ("scale", "axis", "block", "said"),
    [
        ((2, 48), 1, 0, "neither per tensor nor per channel"),
        ((47,), 1, 0, "has 47 values for the 48 channels of axis 1"),
        ((48,), 2, 0, "for axis 2, which data of 2 axes have not"),
        ((64, 3), 0, 16, r"has to be \[4, 48\] for blocks of 16 along axis 0"),
        ((48,), 0, 16, r"has to be \[4, 48\]"),
    ],
)
def test_a_scale_of_the_wrong_shape_is_named(
    scale: tuple[int, ...], axis: int, block: int, said: str, tmp_path: Path
) -> None:
    blocks = {"block_size": block} if block else {}
    nodes = [node("DequantizeLinear", "w", "s", y="wd", axis=axis, **blocks), node("MatMul", "x", "wd")]
    path = Model(nodes, {"w": codes(-9, 9, INT8), "s": np.full(scale, 0.1, np.float32)}, {}).save(tmp_path / "m.onnx")
    (check,) = (check for check in verify_foreign(path) if check.name == "scales")
    assert not check.passed and re.search(said, check.detail)
    with pytest.raises(VerificationError, match=said):
        qcompile.repair_onnx(path, tmp_path / "new.onnx")


def test_scales_of_int4_may_be_negative(tmp_path: Path) -> None:
    """ONNX Runtime and NNCF write them so, and TensorRT and ONNX Runtime take them."""
    nodes = [node("DequantizeLinear", "w", "s", y="wd", axis=0, block_size=16), node("MatMul", "x", "wd")]
    scales = RNG.uniform(-0.1, 0.1, (4, 48)).astype(np.float32)
    path = Model(nodes, {"w": codes(-8, 7, ml_dtypes.int4), "s": scales}, {}).save(tmp_path / "m.onnx")
    assert all(check.passed for check in verify_foreign(path))
    assert not qcompile.repair_onnx(path, tmp_path / "new.onnx").changed
    if importlib.util.find_spec("tensorrt_rtx"):
        built = qcompile.build_engine(path, target="sm89", expect={"gemm_int4": 1}, progress=False)
        assert built.gemms["int4"] == 1 and not built.not_low_precision


def test_layers_of_other_operators_are_counted(tmp_path: Path) -> None:
    found = {}
    for kind in ("operators on codes", "nbits 4"):
        graph = OnnxGraph.load(KINDS[kind]().save(tmp_path / "m.onnx"))
        found[kind] = [(gemm.kind, gemm.unquantized) for gemm in find_gemms(graph, [])]
    assert found == {"operators on codes": [("conv", ()), ("gemm", ())], "nbits 4": [("gemm", ("activation",))]}


@pytest.mark.parametrize("kept", ["int16", "operator"])
def test_what_stays_fails_in_repair_and_inspect_alike(kept: str, tmp_path: Path) -> None:
    model = product((0, np.int16)) if kept == "int16" else product()
    if kept == "operator":
        model.nodes.insert(0, node("FastGelu", "x", y="g", domain=MICROSOFT))
        model.nodes[1].input[0] = "g"
    report = qcompile.repair_onnx(model.save(tmp_path / "old.onnx"), tmp_path / "new.onnx")
    failed = [check.name for check in report.checks if not check.passed]
    assert failed == [check.name for check in verify_foreign(tmp_path / "new.onnx") if not check.passed]
    assert failed == (["tensorrt"] if kept == "int16" else ["nothing_opaque"]) and report.notices


def test_scales_of_another_type_than_the_model(tmp_path: Path) -> None:
    """Half precision with float32 scales, as ONNX Runtime's and modelopt's tools write it: only TensorRT loads it."""
    right, wrong = product((0, INT8)), product((0, INT8))
    for model in (right, wrong):
        model.nodes.insert(0, node("Cast", "x", y="h", to=TensorProto.FLOAT16))
        model.nodes[1].input[0] = "h"
        model.constants["t"] = model.constants["t"].astype(np.float16)
        model.nodes[-1].output[0] = "m"
        model.nodes.append(node("Cast", "m", to=TensorProto.FLOAT))
    right.constants.update(wrong.constants)
    right.constants["s"] = np.float16(0.03)
    report = qcompile.repair_onnx(wrong.save(tmp_path / "old.onnx"), tmp_path / "new.onnx")
    assert report.changed and all(check.passed for check in report.checks)
    x = np.random.default_rng(1).standard_normal(MATRIX).astype(np.float32)
    (expected,) = ReferenceEvaluator(str(right.save(tmp_path / "right.onnx"))).run(None, {"x": x})
    # a code of x may fall to its other side in half precision: that is a step of 0.03 times the largest weight
    np.testing.assert_allclose(run(tmp_path / "new.onnx", x), expected, rtol=0, atol=1e-2 * np.abs(expected).max())
