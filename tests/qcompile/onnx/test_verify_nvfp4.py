"""What the verifier says of NVFP4 files: global scales that differ, and rotated activations that are constants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import numpy_helper
from torch.export import Dim, ExportedProgram

import qcompile
from qcompile.errors import VerificationError
from qcompile.onnx import export as export_module
from qcompile.onnx.execute import run_onnx_intermediates
from qcompile.onnx.verify import onnx_dependence, require, verify_onnx
from tests.qcompile.onnx.nvfp4 import Mlp, quantized, reference

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
SOURCE = {"output": {"x"}}


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    torch.manual_seed(0)
    return quantized(Mlp(), X, rotate=True, dynamic_shapes=({0: Dim("rows", max=64)},))


@pytest.fixture(scope="module")
def path(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nvfp4") / "m.onnx"
    qcompile.export_onnx(program, path)
    return path


@pytest.fixture
def model(path: Path) -> onnx.ModelProto:
    return onnx.load(path)


def failures(model: onnx.ModelProto) -> dict[str, str]:
    return {check.name: check.detail for check in verify_onnx(model, SOURCE) if not check.passed}


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def dequantize_of_scales(model: onnx.ModelProto, layer: str = "up") -> onnx.NodeProto:
    """The node that dequantizes the block scales of a layer's input."""
    name = f"{layer}.input_global_scale"
    return next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[1] == name)


def test_the_file_passes_and_its_pairs_are_counted(model: onnx.ModelProto) -> None:
    assert failures(model) == {}
    (check,) = (c for c in verify_onnx(model, SOURCE) if c.name == "global_scales")
    assert check.detail == "2 pairs of quantize and dequantize with equal, constant global scales"


def test_a_global_scale_that_differs(model: onnx.ModelProto) -> None:
    g = numpy_helper.to_array(initializer(model, "up.input_global_scale"))
    model.graph.initializer.append(numpy_helper.from_array(np.nextafter(g, np.float32(1)), "other"))
    dequantize_of_scales(model).input[1] = "other"
    found = failures(model)
    assert list(found) == ["global_scales"]
    for words in ("TRT_FP4DynamicQuantize", "'up.input_global_scale'", "'other'", "module 'up'"):
        assert words in found["global_scales"]


def test_global_scales_are_compared_by_value(model: onnx.ModelProto) -> None:
    g = numpy_helper.to_array(initializer(model, "up.input_global_scale"))
    model.graph.initializer.append(numpy_helper.from_array(g, "copy"))
    dequantize_of_scales(model).input[1] = "copy"
    assert failures(model) == {}


def test_a_global_scale_that_is_computed(model: onnx.ModelProto) -> None:
    node = dequantize_of_scales(model)
    reduced = onnx.helper.make_node("ReduceMax", ["x"], ["computed"], keepdims=0)
    model.graph.node.insert(0, reduced)
    node.input[1] = "computed"
    assert "global_scales" in failures(model)


@pytest.mark.parametrize("value", [0.0, np.inf, np.nan])
def test_a_global_scale_that_is_no_scale(model: onnx.ModelProto, value: float) -> None:
    initializer(model, "up.input_global_scale").CopyFrom(
        numpy_helper.from_array(np.array(value, np.float32), "up.input_global_scale")
    )
    found = failures(model)
    assert "up.input_global_scale" in found["scales"]


# --- Model Optimizer's issue 1424: the rotated activation is a constant of the file, which ignores its input ----------


def baked(model: onnx.ModelProto, factor: str) -> onnx.ModelProto:
    """`model` with the result of a rotation replaced by what it is for one input."""
    (rotation,) = (node for node in model.graph.node if factor in node.input)
    (name,) = rotation.output
    value = run_onnx_intermediates(model, {"x": X.numpy()}, [name]).values[name]
    kept = [node for node in model.graph.node if node is not rotation]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


@pytest.mark.parametrize("factor", ["hadamard_64", "hadamard_128"])
def test_a_rotated_activation_that_was_baked_into_a_constant(model: onnx.ModelProto, factor: str) -> None:
    expected = reference(model, {"x": X.numpy()})
    assert not np.allclose(expected, reference(model, {"x": -X.numpy()}), atol=0.1)
    assert onnx_dependence(model) == SOURCE
    model = baked(model, factor)
    for x in (X, -X):  # a file that runs, gives the right numbers for one input, and ignores every other
        np.testing.assert_array_equal(reference(model, {"x": x.numpy()}), expected)
    assert onnx_dependence(model) == {"output": set()}
    found = failures(model)
    assert "'output' no longer depends on input 'x'" in found["input_dependence"]
    with pytest.raises(VerificationError, match="input_dependence"):
        require(verify_onnx(model, SOURCE))
    alone = {check.name: check for check in verify_onnx(model)}
    assert not alone["input_dependence"].passed  # with no program to compare with, too


def test_an_export_that_bakes_it_is_refused(
    program: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tidy = export_module.tidy

    def bake(model: onnx_ir.Model) -> None:
        rotation = next(n for n in model.graph if any(v and v.name == "hadamard_64" for v in n.inputs))
        constant = onnx_ir.tensor(np.zeros((3, 64), np.float32), name="baked")
        value = onnx_ir.Value(name="baked", shape=onnx_ir.Shape([3, 64]), type=onnx_ir.TensorType(constant.dtype))
        value.const_value = constant
        model.graph.register_initializer(value)
        for use in list(rotation.outputs[0].uses()):
            use.node.replace_input_with(use.idx, value)
        model.graph.remove(rotation, safe=True)
        tidy(model)

    monkeypatch.setattr(export_module, "tidy", bake)
    with pytest.raises(VerificationError, match="input_dependence: output 'output' no longer depends on input 'x'"):
        qcompile.export_onnx(program, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_quantized_at_run_time(model: onnx.ModelProto) -> None:
    """A float weight in front of TensorRT's operator is four bytes for each code, and work at run time."""
    call = next(node for node in model.graph.node if node.op_type == "TRT_FP4DynamicQuantize")
    weight = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "float_weight"))
    call.input[0] = "float_weight"
    found = failures(model)["float_weights"]
    assert "QuantizeLinear 'getitem' (module 'up') quantizes the constant" in found and "fold it into codes" in found
