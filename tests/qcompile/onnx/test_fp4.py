"""`trt::TRT_FP4DynamicQuantize`: its body against the numpy oracle, and FP4 codes in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, checker, helper, shape_inference
from onnx.reference import ReferenceEvaluator
from torch import nn

import qcompile
from qcompile.onnx.execute import run_onnx_intermediates
from qcompile.onnx.fp4 import DOMAIN, NAME, fp4_dynamic_quantize_function
from tests.nvfp4 import bits, oracle, unpacked
from tests.qcompile.onnx.nvfp4 import quantized

FLOATS = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, ml_dtypes.bfloat16: TensorProto.BFLOAT16}


def model_of(shape: list[Any], elem_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
    call = helper.make_node(
        NAME,
        ["x", "g"],
        ["codes", "scales"],
        domain=DOMAIN,
        axis=-1,
        block_size=16,
        scale_type=TensorProto.FLOAT8E4M3FN,
    )
    graph = helper.make_graph(
        [call],
        "g",
        [
            helper.make_tensor_value_info("x", elem_type, shape),
            helper.make_tensor_value_info("g", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("codes", TensorProto.FLOAT4E2M1, shape),
            helper.make_tensor_value_info("scales", TensorProto.FLOAT8E4M3FN, [*shape[:-1], shape[-1] // 16]),
        ],
    )
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    function = onnx_ir.serde.serialize_function(fp4_dynamic_quantize_function(23))
    return helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=11)


def assert_equal(codes: np.ndarray, scales: np.ndarray, x: np.ndarray, g: Any) -> None:
    """Equal to the oracle in every bit; ONNX may write a zero with the sign of what it was rounded from."""
    expected_codes, expected_scales = oracle(x, g)
    np.testing.assert_array_equal(bits(scales), bits(expected_scales))
    found = codes.view(np.uint8)
    np.testing.assert_array_equal(np.where(found == 8, 0, found), np.where(expected_codes == 8, 0, expected_codes))


EVALUATOR = ReferenceEvaluator(model_of(["a", "b", 32]))
sizes = st.sampled_from([0.0, 1e-30, 1e-9, 1e-3, 1.0, 1e4]).map(np.float32)


@given(
    x=hnp.arrays(np.float32, (2, 2, 2, 16), elements=st.floats(-3, 3, width=32)),
    magnitude=hnp.arrays(np.float32, (2, 2, 2, 1), elements=sizes),
    g=st.floats(2.0**-20, 2.0**10, width=32),
)
def test_the_body_equals_the_oracle(x: np.ndarray, magnitude: np.ndarray, g: float) -> None:
    x = (x * magnitude).reshape(2, 2, 32)
    codes, scales = EVALUATOR.run(None, {"x": x, "g": np.array(g, np.float32)})
    assert_equal(codes, scales, x, g)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [[5, 48], [2, 3, 32], [2, 1, 3, 16]], ids=str)
def test_the_body_takes_every_rank_and_type(shape: list[int], dtype: type) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    x[0] = 0
    codes, scales = ReferenceEvaluator(model_of(shape, FLOATS[dtype])).run(
        None, {"x": x, "g": np.array(7e-4, np.float32)}
    )
    assert_equal(codes, scales, x.astype(np.float32), 7e-4)


@pytest.mark.parametrize("elem_type", FLOATS.values(), ids=lambda t: TensorProto.DataType.Name(t))
@pytest.mark.parametrize("shape", [["n", 64], ["b", "s", 64]], ids=str)
def test_checker_and_strict_shape_inference_take_it(shape: list[Any], elem_type: int) -> None:
    model = model_of(shape, elem_type)
    checker.check_model(model, full_check=True)
    shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


@pytest.mark.everyday(3)
@pytest.mark.parametrize("target", ["tensorrt", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lead", [(4,), (2, 3)], ids=str)
def test_codes_and_block_scales_in_a_file_equal_the_oracle(
    tmp_path: Path, target: Any, dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    layer, x = nn.Linear(64, 8).to(dtype), torch.randn(*lead, 64, dtype=dtype)
    x[0] = 0
    program = quantized(layer, x, dtype=dtype)
    qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)
    model = onnx.load(tmp_path / "m.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weight = stored["weight"]
    assert (weight.data_type, list(weight.dims)) == (TensorProto.FLOAT4E2M1, [8, 64])
    scales = onnx.numpy_helper.to_array(stored["weight_block_scale"])
    g = onnx.numpy_helper.to_array(stored["weight_global_scale"])
    codes, expected_scales = oracle(layer.weight.detach().float().numpy(), g)
    np.testing.assert_array_equal(bits(scales), bits(expected_scales))
    np.testing.assert_array_equal(unpacked(np.frombuffer(weight.raw_data, np.uint8).reshape(8, 32)), codes)

    made = names_of_codes(model)
    feeds = {model.graph.input[0].name: x.numpy()}
    found = run_onnx_intermediates(tmp_path / "m.onnx", feeds, made).values
    g = onnx.numpy_helper.to_array(stored["input_global_scale"])
    codes, scales = (found[name].reshape((*x.shape[:-1], -1)) for name in made)
    assert_equal(codes, scales, x.float().numpy(), g)


def names_of_codes(model: onnx.ModelProto) -> tuple[str, str]:
    """The tensors of a file that hold the codes and the block scales of its one quantized activation."""
    calls = [node for node in model.graph.node if node.op_type == NAME]
    if calls:
        return calls[0].output[0], calls[0].output[1]
    types = {
        node.output[0]: any(a.name == "output_dtype" and a.i == TensorProto.FLOAT4E2M1 for a in node.attribute)
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    (codes,), (scales,) = ([name for name, fp4 in types.items() if fp4 is wanted] for wanted in (True, False))
    return codes, scales


def test_an_empty_batch_has_no_codes() -> None:
    codes, scales = ReferenceEvaluator(model_of(["b", "s", 32])).run(
        None, {"x": np.zeros((0, 3, 32), np.float32), "g": np.float32(1)}
    )
    assert (codes.shape, scales.shape) == ((0, 3, 32), (0, 3, 2))
