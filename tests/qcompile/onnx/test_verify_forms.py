"""Checks of forms that build but are slow or wrong."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from qcompile.onnx.verify import require, verify_onnx


def failed(model: Any, name: str, *words: str) -> None:
    checks = {check.name: check for check in verify_onnx(model.proto)}
    assert {n for n, check in checks.items() if not check.passed} == {name}
    for word in words:
        assert word in checks[name].detail


@pytest.mark.parametrize("through", ["", "Transpose", "Identity"])
def test_unfolded_weight(model: Any, through: str) -> None:
    model.set("weight", np.ones((16, 16), np.float32))
    if through:
        model.add(through, ["weight"], "moved", before="wd")
    model.add("QuantizeLinear", ["moved" if through else "weight", "w_scale", "zero"], "wq", before="wd")
    model.node("wd").input[0] = "wq"
    failed(model, "float_weights", "QuantizeLinear 'n_wq'", "fold it", "module 'vit.layers.0.attention.q_proj'")


def test_float_copy_left_behind(model: Any) -> None:
    model.set("weight_float", np.ones((16, 16), np.float32))
    failed(model, "float_weights", "'weight_float' (FLOAT [16, 16]) is used by no output")
    model.add("Identity", ["weight_float"], "dead", before="xq")  # a user that no output needs is no user
    failed(model, "float_weights", "'weight_float'")


def test_cast_before_the_gemm(model: Any) -> None:
    model.add("Cast", ["wd"], "w_cast", before="xw", to=TensorProto.FLOAT)
    model.add("Transpose", ["w_cast"], "w_moved", before="xw")
    model.node("xw").input[1] = "w_moved"
    failed(model, "casts", "Cast 'n_w_cast'", "DequantizeLinear 'n_wd'", "MatMul 'n_xw'")


def test_cast_before_quantize_and_after_the_gemm(model: Any) -> None:
    model.add("Cast", ["x"], "x_cast", before="xq", to=TensorProto.FLOAT)
    model.node("xq").input[0] = "x_cast"
    model.add("Cast", ["xw"], "xw_cast", before="h0", to=TensorProto.FLOAT)
    model.node("h0").input[0] = "xw_cast"
    require(verify_onnx(model.proto))


def test_fp8_times_int8(model: Any) -> None:
    model.set("zero8", np.array(0, np.int8))
    for output in ("xq", "xd"):
        model.node(output).input[2] = "zero8"
    failed(model, "gemm_types", "MatMul 'n_xw'", "FLOAT8E4M3FN and INT8")


def block(model: Any, *, expanded: bool = False) -> None:
    model.set("w_scale", np.full((2, 1 if expanded else 16), 0.5, np.float32))
    wd = model.node("wd")
    if expanded:
        model.set("blocks", np.array([2, 16], np.int64))
        model.add("Expand", ["w_scale", "blocks"], "w_expanded", before="wd")
        wd = model.node("wd")
        wd.input[1] = "w_expanded"
    wd.input.pop()
    wd.attribute.extend([helper.make_attribute("axis", 0), helper.make_attribute("block_size", 8)])


@pytest.mark.parametrize("expanded", [False, True])
def test_block_weight_with_per_tensor_activation(model: Any, expanded: bool) -> None:
    block(model, expanded=expanded)
    failed(model, "block_weights", "MatMul 'n_xw'", "miscompiled", "n_wd", "n_xd", "attention.q_proj")


def test_a_scale_for_each_element_is_a_block_too(model: Any) -> None:
    model.set("w_scale", np.full((16, 16), 0.5, np.float32))
    wd = model.node("wd")
    wd.input.pop()
    wd.attribute.extend([helper.make_attribute("axis", 0), helper.make_attribute("block_size", 1)])
    failed(model, "block_weights", "MatMul 'n_xw'", "use the K-split form or per-channel weights")


def test_block_weight_behind_a_transpose(model: Any) -> None:
    block(model)
    model.add("Transpose", ["wd"], "w_moved", before="xw")
    model.node("xw").input[1] = "w_moved"
    failed(model, "block_weights", "n_wd")


def test_block_weight_only(model: Any) -> None:
    block(model)
    model.node("xw").input[0] = "x"
    for output in ("xd", "xq"):
        model.proto.graph.node.remove(model.node(output))
    model.proto.graph.initializer.remove(next(t for t in model.proto.graph.initializer if t.name == "x_scale"))
    require(verify_onnx(model.proto))


def test_a_cast_behind_blocks_is_fine(model: Any) -> None:
    """Scales of blocks are float32, whatever the graph computes in; weight-only."""
    block(model)
    model.add("Cast", ["wd"], "w_cast", before="xw", to=TensorProto.FLOAT)
    model.node("xw").input[0], model.node("xw").input[1] = "x", "w_cast"
    for output in ("xd", "xq"):
        model.proto.graph.node.remove(model.node(output))
    model.proto.graph.initializer.remove(next(t for t in model.proto.graph.initializer if t.name == "x_scale"))
    require(verify_onnx(model.proto))


def test_k_split_form(model: Any) -> None:
    """Batched FP8 GEMMs with per-tensor constants, the block scales behind them: what block FP8 lowers to."""
    model.set("weight", np.ones((2, 8, 16), ml_dtypes.float8_e4m3fn))
    model.set("split", np.array([-1, 2, 8], np.int64))
    model.set("block_scales", np.full((2, 1, 16), 0.5, np.float32))
    model.set("axes", np.array([0], np.int64))
    model.set("back", np.array([-1, 32, 16], np.int64))
    model.add("Reshape", ["xd", "split"], "xs", before="xw")
    model.add("Transpose", ["xs"], "xt", before="xw", perm=[1, 0, 2])
    model.node("xw").input[0] = "xt"
    model.add("Mul", ["xw", "block_scales"], "scaled", before="h0")
    model.add("ReduceSum", ["scaled", "axes"], "summed", before="h0", keepdims=0)
    model.add("Reshape", ["summed", "back"], "restored", before="h0")
    model.node("h0").input[0] = "restored"
    require(verify_onnx(model.proto))
