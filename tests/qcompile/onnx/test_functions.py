"""The body of `trt::TRT_QuantizedAttention` against the FX operator that it stands for."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import checker, helper, shape_inference
from onnx.reference import ReferenceEvaluator

import passes.ir
from qcompile.onnx.functions import DOMAIN, NAME, quantized_attention_function
from qcompile.onnx.session import onnx_session

OPSETS = range(19, 24)


def model_of(
    heads: int, kv_heads: int, width: int, opset: int = 21, dtype: int = 1, *, masked: bool = False
) -> onnx.ModelProto:
    """One call of the function, with dynamic batch and lengths."""
    mask = ["mask"] if masked else [""]
    call = helper.make_node(
        NAME, ["q", "k", "v", *mask, "scale"], ["y"], domain=DOMAIN, normalization_quantize_to_type=17, scale=1.0,
        is_causal=int(not masked), TRT_decomposable=1, kv_repeats=[1, 1, heads // kv_heads, 1, 1],
        kv_shape=[0, heads, -1, width],
    )  # fmt: skip
    cache: list[object] = ["b", kv_heads, "t", width]
    shapes: dict[str, list[object]] = {"q": ["b", heads, "s", width], "k": cache, "v": cache, "scale": []}
    shapes |= {"mask": ["b", 1, "s", "t"]} if masked else {}
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", dtype, ["b", heads, "s", width])
    graph = helper.make_graph([call], "g", inputs, [output])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    function = onnx_ir.serde.serialize_function(quantized_attention_function(opset, masked=masked))
    return helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)


@settings(max_examples=15)
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 3), groups=st.integers(1, 3), queries=st.integers(1, 9),
    extra=st.integers(-3, 3), width=st.sampled_from([4, 8, 40]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_body_equals_the_reference_in_onnx_runtime(
    batch: int, kv_heads: int, groups: int, queries: int, extra: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, keys = kv_heads * groups, max(1, queries + extra)
    q, k, v = (
        torch.randn(batch, h, length, width, generator=generator)
        for h, length in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )
    scale = torch.tensor(2.0**-9)  # a power of two: division and multiplication are exact
    expected = passes.ir.attention(q, k, v, None, scale, is_causal=True, format="fp8").numpy()
    feeds = {name: tensor.numpy() for name, tensor in {"q": q, "k": k, "v": v, "scale": scale}.items()}
    session = onnx_session(model_of(heads, kv_heads, width).SerializeToString())
    (found,) = session.run(None, feeds)
    assert found.shape == expected.shape
    # One step of a code (1/16 of a probability) can flip where float32 sums differ in the last bit; few do.
    unequal = np.abs(found - expected) > 1e-5 * np.abs(v.numpy()).max()
    assert unequal.mean() < 0.02
    assert np.abs(found - expected).max() <= np.abs(v.numpy()).max() / 8


def test_a_mask_is_added() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, length, 8, generator=generator) for h, length in ((4, 3), (2, 9), (2, 9)))
    mask = torch.randn(2, 1, 3, 9, generator=generator)
    mask[..., 5] = -3e4
    scale = torch.tensor(2.0**-9)
    expected = passes.ir.attention(q, k, v, mask, scale, is_causal=False, format="fp8").numpy()
    model = model_of(4, 2, 8, masked=True)
    checker.check_model(model, full_check=True)
    feeds = {n: t.numpy() for n, t in {"q": q, "k": k, "v": v, "mask": mask, "scale": scale}.items()}
    for run in (onnx_session(model.SerializeToString()), ReferenceEvaluator(model)):
        (found,) = run.run(None, feeds)
        np.testing.assert_allclose(found, expected, atol=0.02)


@settings(max_examples=15)
@given(groups=st.integers(1, 2), queries=st.integers(1, 6), seed=st.integers(0, 99))
def test_every_bit_is_that_of_the_reference(groups: int, queries: int, seed: int) -> None:
    """On numbers so small that every product and sum is exact in float32, in whatever order it is added."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randint(-1, 2, (1, heads, queries, 4), generator=generator) / 2 for heads in (2 * groups, 2, 2))
    scale = torch.tensor(2.0**-9)
    expected = passes.ir.attention(q, k, v, None, scale, is_causal=True, format="fp8").numpy()
    feeds = {name: tensor.numpy() for name, tensor in {"q": q, "k": k, "v": v, "scale": scale}.items()}
    (found,) = ReferenceEvaluator(model_of(2 * groups, 2, 4)).run(None, feeds)
    np.testing.assert_array_equal(found, expected)  # the codes keep nothing of the last bits of a softmax


@pytest.mark.parametrize("opset", OPSETS)
def test_checker_shape_inference_and_the_reference_evaluator_take_it(opset: int) -> None:
    model = model_of(4, 2, 8, opset)
    checker.check_model(model, full_check=True)
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert [d.dim_param or d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim] == ["b", 4, "s", 8]
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, h, 6, 8)).astype(np.float32) for h in (4, 2, 2))
    feeds = {"q": q, "k": k, "v": v, "scale": np.array(2.0**-9, np.float32)}
    (by_reference,) = ReferenceEvaluator(model).run(None, feeds)
    (by_ort,) = onnx_session(model.SerializeToString()).run(None, feeds)
    expected = passes.ir.attention(
        *(torch.from_numpy(t) for t in (q, k, v)), None, torch.tensor(2.0**-9), is_causal=True, format="fp8"
    ).numpy()
    for found in (by_reference, by_ort):
        assert np.abs(found - expected).mean() < 1e-3 * np.abs(expected).mean()


def test_no_score_of_a_hidden_key_is_infinite_in_float16() -> None:
    model = model_of(1, 1, 4, dtype=onnx.TensorProto.FLOAT16)
    for outputs in (model.functions[0].output, model.graph.node[0].output):
        outputs.append("masked")
    model.graph.output.append(helper.make_tensor_value_info("masked", onnx.TensorProto.FLOAT16, None))
    q, k = np.full((1, 1, 3, 4), -16, np.float16), np.full((1, 1, 3, 4), 16, np.float16)
    _, masked = ReferenceEvaluator(model).run(None, {"q": q, "k": k, "v": k, "scale": np.array(1 / 448, np.float16)})
    assert masked.dtype == np.float16 and np.isfinite(masked).all()
    assert (masked[..., np.triu_indices(3, 1)[0], np.triu_indices(3, 1)[1]] < -3e4).all()


def test_a_key_in_the_future_has_no_say() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 5, 8)).astype(np.float16) for _ in range(3))
    session = onnx_session(model_of(2, 2, 8, dtype=onnx.TensorProto.FLOAT16).SerializeToString())
    feeds = {"q": q, "k": k, "v": v, "scale": np.array(1 / 448, np.float16)}
    (before,) = session.run(None, feeds)
    k[:, :, 3:], v[:, :, 3:] = 9, -9
    (after,) = session.run(None, feeds)
    assert np.array_equal(before[:, :, :3], after[:, :, :3]) and not np.array_equal(before, after)
    assert np.allclose(before[:, :, 0], session.run(None, {**feeds, "k": k[:, :, :1], "v": v[:, :, :1]})[0][:, :, 0])
