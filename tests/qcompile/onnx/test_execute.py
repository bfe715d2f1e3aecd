"""Intermediates and layers of an ONNX file, with ml_dtypes and onnx.reference as judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qcompile.errors import VerificationError
from qcompile.onnx.compare import Segment, compare, run_onnx_intermediates, run_onnx_layers
from qcompile.onnx.execute import ORT, REFERENCE

F8 = ml_dtypes.float8_e4m3fn
NAMES = ["xq", "xd", "wd", "xw", "h", "hq", "y"]


def reference(model: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return ReferenceEvaluator(model.proto).run(None, feeds, intermediate=True)  # type: ignore[return-value]


@pytest.mark.parametrize("external", [False, True])
def test_intermediates(model: Any, feeds: Any, tmp_path: Path, external: bool) -> None:
    expected = reference(model, feeds)
    path = tmp_path / "m.onnx"
    onnx.save(model.proto, path, save_as_external_data=external, location="m.data", size_threshold=0)
    run = run_onnx_intermediates(path, feeds, NAMES)
    assert set(run.evaluators.values()) == {ORT}
    assert list(run.values) == NAMES
    assert not run.reasons
    for name in ("xq", "xd", "wd"):
        assert run.values[name].dtype == expected[name].dtype
        assert run.values[name].tobytes() == expected[name].tobytes()
    np.testing.assert_allclose(run.values["h"], expected["h"], rtol=1e-5, atol=1e-5)


def test_codes_equal_ml_dtypes(model: Any, feeds: Any) -> None:
    feeds["x"].ravel()[:4] = [1e9, -1e9, 0.0, -0.0]
    codes = run_onnx_intermediates(model.proto, feeds, ["xq"]).values["xq"]
    oracle = np.clip(feeds["x"] / np.float32(2**-5), -448, 448).astype(F8)
    assert codes.dtype == F8
    assert codes.tobytes() == oracle.tobytes()


def test_isolated_tensor_is_replaced_for_its_users_only(model: Any, feeds: Any) -> None:
    """One flipped code, as FP8 codes, is seen downstream; the computed codes can still be asked for."""
    plain = run_onnx_intermediates(model.proto, feeds, ["xq", "xd"]).values
    flipped = plain["xq"].copy()
    flipped.view(np.uint8).ravel()[0] ^= 1
    run = run_onnx_intermediates(model.proto, feeds, ["xq", "xd"], isolate={"xq": flipped}).values
    assert run["xq"].tobytes() == plain["xq"].tobytes()
    assert run["xd"].tobytes() == (flipped.astype(np.float32) * np.float32(2**-5)).tobytes()


def test_layers_do_not_pass_errors_on(model: Any, feeds: Any) -> None:
    expected = {**reference(model, feeds), **feeds}
    parts = {
        "q": (["x"], ["xq"]),
        "gemm": (["xq"], ["xw"]),
        "bias": (["xw", "mask"], ["h"]),
        "attention": (["hq"], ["y"]),
    }
    segments = [Segment(n, {i: expected[i] for i in ins}, outs) for n, (ins, outs) in parts.items()]
    broken = Segment("gemm", {"xq": np.zeros_like(expected["xq"])}, ["xw"])
    good = run_onnx_layers(model.proto, segments)
    bad = run_onnx_layers(model.proto, [segments[0], broken, *segments[2:]])
    assert set(good.evaluators.values()) == {ORT}
    assert all(d.relative_l2 < 1e-5 for d in compare({n: expected[n] for n in good.values}, good.values).differences)
    assert not bad.values["xw"].any()
    assert bad.values["h"].tobytes() == good.values["h"].tobytes()


def test_a_coarse_segment_over_fine_ones_is_not_cut(model: Any, feeds: Any) -> None:
    wrong = np.zeros((2, 32, 16), np.float32)
    coarse = Segment("all", feeds, ["h"])
    fine = Segment("bias", {"xw": wrong}, ["h0"])
    run = run_onnx_layers(model.proto, [coarse, fine])
    assert run.values["h"].tobytes() == run_onnx_intermediates(model.proto, feeds, ["h"]).values["h"].tobytes()
    assert run.values["h0"][0, 0].tobytes() == numpy_helper.to_array(model.proto.graph.initializer[5]).tobytes()


def test_segment_with_too_few_inputs(model: Any, feeds: Any) -> None:
    with pytest.raises(VerificationError, match="need graph input 'mask', which is not given"):
        run_onnx_layers(model.proto, [Segment("s", {"xw": feeds["x"]}, ["h"])])
    with pytest.raises(VerificationError, match="no tensor 'nothing'"):
        run_onnx_intermediates(model.proto, feeds, ["nothing"])
    with pytest.raises(VerificationError, match="outputs of two segments"):
        run_onnx_layers(model.proto, [Segment(n, feeds, ["h"]) for n in "ab"])


def test_wrong_feeds_are_not_hidden_by_the_fallback(model: Any, feeds: Any) -> None:
    with pytest.raises(Exception, match="float16"):
        run_onnx_intermediates(model.proto, {**feeds, "x": feeds["x"].astype(np.float16)}, ["y"])


def chain(*nodes: onnx.NodeProto, out: int, opset: int = 23, **initializers: np.ndarray) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 32])],
        [helper.make_tensor_value_info(nodes[-1].output[0], out, [2, 32])],
        [numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def test_bfloat16_and_int4_leave_exactly() -> None:
    model = chain(
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["b"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["f", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        out=TensorProto.FLOAT,
        scale=np.array(0.5, np.float32),
        zero=np.array(0, ml_dtypes.int4),
    )
    x = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32) * 3
    x[0, :5] = [1.5e38, -1e30, 1e-30, np.inf, 65537.0]  # that float16 does not hold
    run = run_onnx_intermediates(model, {"x": x}, ["b", "q", "d"])
    assert set(run.evaluators.values()) == {ORT}
    b = x.astype(ml_dtypes.bfloat16)
    q = np.clip(np.rint(b.astype(np.float32) / 0.5), -8, 7).astype(ml_dtypes.int4)
    assert run.values["b"].dtype == b.dtype
    assert run.values["b"].tobytes() == b.tobytes()
    assert run.values["q"].dtype == q.dtype
    assert run.values["q"].tobytes() == q.tobytes()
    again = run_onnx_intermediates(model, {"x": x}, ["f"], isolate={"b": b}).values["f"]
    assert again.tobytes() == b.astype(np.float32).tobytes()


def fp4() -> onnx.ModelProto:
    return chain(
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Add", ["d", "bias"], ["y"]),
        out=TensorProto.FLOAT,
        scale=np.array(0.5, np.float32),
        zero=np.array(0, ml_dtypes.float4_e2m1fn),
        bias=np.ones(32, np.float32),
    )


@pytest.mark.parametrize("external", [False, True])
def test_what_onnxruntime_lacks_is_run_by_the_reference(tmp_path: Path, external: bool) -> None:
    onnx.save(fp4(), tmp_path / "m.onnx", save_as_external_data=external, location="m.data", size_threshold=0)
    x = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    run = run_onnx_intermediates(tmp_path / "m.onnx", {"x": x}, ["r", "q", "y"])
    assert set(run.evaluators.values()) == {REFERENCE}
    assert "NOT_IMPLEMENTED" in run.reasons[0]
    codes = (np.maximum(x, 0) / np.float32(0.5)).astype(ml_dtypes.float4_e2m1fn)
    assert run.values["q"].dtype == codes.dtype
    assert run.values["q"].tobytes() == codes.tobytes()
    assert run.values["y"].tobytes() == (codes.astype(np.float32) * np.float32(0.5) + 1).tobytes()


def test_only_the_layer_that_onnxruntime_lacks_falls_back() -> None:
    x = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    segments = [Segment("relu", {"x": x}, ["r"]), Segment("q", {"r": x}, ["d"]), Segment("add", {"d": x}, ["y"])]
    run = run_onnx_layers(fp4(), segments)
    assert run.evaluators == {"r": ORT, "d": REFERENCE, "y": ORT}
    assert run.values["y"].tobytes() == (x + 1).tobytes()


@pytest.mark.parametrize(("operator", "wanted", "numpys"), [("Mean", 1.0, 0.255859375), ("Sum", 1000.0, 256.0)])
def test_a_sum_in_half_precision_is_one_in_float32(operator: str, wanted: float, numpys: float) -> None:
    """ONNX Runtime has no kernels for bfloat16 on a CPU."""
    graph = helper.make_graph(
        [helper.make_node(f"Reduce{operator}", ["x", "axes"], ["y"], keepdims=0)],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2, 1000])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2])],
        [numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = np.ones((2, 1000), ml_dtypes.bfloat16)
    assert ReferenceEvaluator(proto).run(None, {"x": x})[0].astype(float).tolist() == [numpys] * 2
    run = run_onnx_intermediates(proto, {"x": x}, ["y"])
    assert run.evaluators == {"y": REFERENCE} and run.values["y"].astype(float).tolist() == [wanted] * 2
