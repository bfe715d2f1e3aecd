"""Diffusion transformers of diffusers: attention over text and image together, quantized, exported, run and built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

import qcompile

pytest.importorskip("diffusers", reason="the models are diffusers': pip install diffusers")
pytest.importorskip("onnxruntime", reason="it runs the files: pip install 'qcompile[onnxruntime]'")

from benchmarks import diffusion_models, diffusion_zoo
from benchmarks.models import Example

ATTENTIONS = {
    "flux": {"transformer_blocks.0.attn", *(f"single_transformer_blocks.{i}.attn" for i in range(2))},
    "flux2": {"transformer_blocks.0.attn", *(f"single_transformer_blocks.{i}.attn" for i in range(2))},
    "sd3": {"transformer_blocks.0.attn", "transformer_blocks.1.attn"},
    "sd35": {"transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"},
}
# What a recipe may leave out: linear layers of one row for each image, and those at the ends.
ENDS = ("time_text_embed.", "time_guidance_embed.", "x_embedder", "context_embedder", "norm_out.", "proj_out")
MODULATION = ("norm.linear", "norm1.linear", "norm1_context.linear", "_modulation_img.linear", "_modulation_txt.linear",
              "single_stream_modulation.linear")  # fmt: skip


def quantize(example: Example, dtype: torch.dtype = torch.float16, **options: Any) -> ExportedProgram:
    return example.quantized(dtype=dtype, **options)


def make(name: str, dynamic: bool = False) -> Example:
    return getattr(diffusion_models, name)(dynamic=dynamic)


def is_left_out(module: str) -> bool:
    return module.startswith(ENDS) or module.endswith(MODULATION)


def run_file(path: Path, batch: dict[str, torch.Tensor]) -> np.ndarray:
    session = qcompile.onnx_session(path)
    (output,) = session.run(None, {node.name: batch[node.name].numpy() for node in session.get_inputs()})
    assert [node.name for node in session.get_outputs()] == ["sample"]
    return output


def outputs(
    example: Example, program: ExportedProgram, batch: dict[str, torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """What the model and its quantized program make of `batch`."""
    with torch.no_grad():
        return example.model(**batch).sample.numpy(), program.module()(**batch).sample.numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd35", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux2", "sd3"))])
@pytest.mark.parametrize("target", ["tensorrt", pytest.param("portable", marks=pytest.mark.slow)])
def test_every_attention_and_linear_is_quantized_and_the_file_agrees(name: str, target: Any, tmp_path: Path) -> None:
    example, path = make(name), tmp_path / "model.onnx"
    program = quantize(example)
    model, quantized = outputs(example, program, example.kwargs)
    assert distance(quantized, model) < 0.1
    report = qcompile.export_onnx(program, path, target=target, compare=example.kwargs)
    assert all(check.passed for check in report.checks)
    packed = name == "flux2" and target == "tensorrt"  # its single blocks pack the MLP beside the heads
    assert {(d.pass_name, d.module.rpartition(".")[2]) for d in report.declined} == (
        {("SplitPackedHeads", "to_qkv_mlp_proj")} if packed else set()
    )
    assert ATTENTIONS[name] <= {m for m, fmt in report.quantized.items() if fmt == "fp8"}
    assert {m for m in report.unquantized if not is_left_out(m)} == set()
    assert report.comparison is not None
    assert report.comparison.worst(1)[0].badness < 0.01
    assert distance(run_file(path, example.kwargs), quantized) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTIONS)
def test_codes_are_equal_in_float32_with_power_of_two_scales(name: str, tmp_path: Path) -> None:
    example = make(name)
    program = quantize(example, torch.float32, recipe=qcompile.load_recipe("fp8", ["calibration.power_of_two=true"]))
    report = qcompile.export_onnx(program, tmp_path / "model.onnx", compare=example.kwargs)
    assert report.comparison is not None
    assert {d.name: d.unequal for d in report.comparison.differences if d.unequal} == {}
    # float32 numbers near an angle of 3500 (guidance) are 2.4e-4 apart, so its cosine differs by that
    assert report.comparison.worst(1)[0].badness < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_dynamic_file_runs_at_another_size(name: str, tmp_path: Path) -> None:
    example = make(name, dynamic=True)
    program = quantize(example)
    path = tmp_path / "model.onnx"
    qcompile.export_onnx(program, path)
    batch = {key: value[:1] if not key.endswith("_ids") else value for key, value in example.kwargs.items()}
    batch["encoder_hidden_states"] = batch["encoder_hidden_states"].repeat(1, 2, 1)[:, :40]
    if "txt_ids" in batch:
        batch["txt_ids"] = batch["txt_ids"].repeat(2, 1)[:40]
    model, quantized = outputs(example, program, batch)
    assert distance(quantized, model) < 0.1
    assert distance(run_file(path, batch), quantized) < 0.01


@pytest.mark.slow
def test_timesteps_and_positions_beyond_2048_survive_half_precision() -> None:
    """Nearly nothing is quantized, so that what is left is the rounding to float16: of data, but of no angle."""
    example = make("flux")
    batch = dict(example.kwargs)
    batch["img_ids"] = batch["img_ids"] + torch.tensor([0.0, 4001.0, 3001.0])
    batch["timestep"] = torch.tensor([0.98123, 0.54321])
    rules = [{"quantizer": "single_transformer_blocks.1.proj_out.weight_quantizer", "format": "fp8"}]
    program = quantize(example, recipe={"metadata": {"name": "one", "description": "One weight."}, "rules": rules})
    model, half = outputs(example, program, batch)
    assert distance(half, model) < 0.006  # 0.015 with the angles in float16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", *(pytest.param(n, marks=pytest.mark.slow) for n in ("flux2", "sd3", "sd35"))])
@pytest.mark.parametrize("target", ["sm89", pytest.param("sm120", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static", "dynamic"])
def test_engines_run_every_attention_in_fp8(name: str, target: str, dynamic: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the builder: pip install 'qcompile[tensorrt-rtx]'")
    example = make(name, dynamic)
    path = tmp_path / "model.onnx"
    qcompile.export_onnx(quantize(example), path)
    built = qcompile.build_engine(path, target=target, profiles=example.profiles, progress=False)
    assert (built.attention.fp8, built.attention.total) == (len(ATTENTIONS[name]),) * 2
    assert {gap.module for gap in built.not_low_precision if not is_left_out(gap.module)} == set()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision_keep_it_and_fuse(dtype: torch.dtype, tmp_path: Path) -> None:
    """Flux's weights are bfloat16; in float16 the model clips its residual stream."""
    pytest.importorskip("tensorrt_rtx", reason="the builder: pip install 'qcompile[tensorrt-rtx]'")
    example = make("flux")
    batch = {k: v if k.endswith("_ids") else v.to(dtype) for k, v in example.kwargs.items()}
    program = qcompile.quantize(example.model.to(dtype), (), batch, calibration=[batch], progress=False)
    report = qcompile.export_onnx(program, tmp_path / "model.onnx")
    assert all(check.passed for check in report.checks)
    built = qcompile.build_engine(tmp_path / "model.onnx", target="sm89", progress=False)
    assert (built.attention.fp8, built.attention.total) == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet-sd", "unet-sdxl"])
def test_unets_differ_from_their_files_by_roundings_alone(name: str, tmp_path: Path) -> None:
    """In float32 no code of a layer differs, given the program's own inputs; in float16 roundings move some codes by a
    step, and the file is as near to the model as the program is."""
    example = diffusion_zoo.MODELS[name]()
    exact = qcompile.export_onnx(quantize(example, torch.float32), tmp_path / "32.onnx", compare=example.kwargs)
    assert exact.comparison is not None
    assert {d.name: d.unequal for d in exact.comparison.differences if d.unequal} == {}
    assert exact.comparison.worst(1)[0].badness < 1e-5

    program = quantize(example)
    qcompile.export_onnx(program, tmp_path / "16.onnx", target="portable")
    session, given = qcompile.onnx_session(tmp_path / "16.onnx"), example.kwargs
    names = [node.name for node in session.get_inputs()]
    added = {f"added_cond_kwargs_{key}": value for key, value in given.get("added_cond_kwargs", {}).items()}
    (file,) = session.run(None, {each: {**given, **added}[each].numpy() for each in names})
    with torch.no_grad():
        model, quantized = example.model(**given)[0].numpy(), program.module()(**given)[0].numpy()
    assert distance(quantized, model) < 0.05
    assert distance(file, model) < 1.2 * distance(quantized, model)
