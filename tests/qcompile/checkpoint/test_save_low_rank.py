"""Low-rank parts in checkpoints: with the rest they are the weight, and they come back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.export import ExportedProgram

import qcompile
from qcompile.checkpoint.load import load_checkpoint
from qcompile.errors import CheckpointError
from qcompile.report.program import ProgramReport
from tests.qcompile.checkpoint.models import batch, read, tiny

NUMBERS = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])  # of e2m1, by the OCP specification


@pytest.fixture(scope="module")
def made() -> tuple[Any, ExportedProgram]:
    torch.manual_seed(0)
    model, ids = tiny("llama", torch.float32, num_hidden_layers=1), batch()
    recipe = qcompile.load_recipe("nvfp4_low_rank", ["calibration=[{algorithm: svdquant, rank: 8}, {algorithm: mse}]"])
    options: dict[str, Any] = {"calibration": [ids], "dtype": torch.float32, "progress": False}
    return model, qcompile.quantize(model, (), ids, recipe=recipe, **options)


@pytest.fixture(scope="module")
def saved(made: tuple[Any, ExportedProgram], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, program = made
    directory = tmp_path_factory.mktemp("saved") / "modelopt"
    report = qcompile.save_checkpoint(program, directory, format="modelopt", source=model, progress=False)
    assert any("NVFP4_SVD is read by qcompile" in notice for notice in report.notices)
    return directory


def rest(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    codes = tensors[f"{name}.weight"]
    codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()
    values = NUMBERS[codes & 7] * torch.where(codes > 7, -1, 1)
    scale = tensors[f"{name}.weight_scale"].float() * tensors[f"{name}.weight_scale_2"]
    return values * scale.repeat_interleave(16, 1)


def test_the_rest_and_the_low_rank_part_are_the_weight(made: tuple[Any, ExportedProgram], saved: Path) -> None:
    model, tensors = made[0], read(saved)
    layers = [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]
    assert len(layers) == 7
    for name in layers:
        down, up = (tensors[f"{name}.weight_quantizer._svdquant_lora_{which}"] for which in "ab")
        weight = model.get_parameter(f"{name}.weight").detach()
        assert bool((tensors[f"{name}.pre_quant_scale"] == 1).all())
        assert float((rest(tensors, name) + up @ down - weight).norm() / weight.norm()) < 0.1
        assert float((rest(tensors, name) - weight).norm() / weight.norm()) > 0.2
    (algorithm,) = {json.loads((saved / "config.json").read_text())["quantization_config"]["quant_algo"]}
    assert algorithm == "NVFP4_SVD"


@pytest.mark.slow
def test_it_is_read_as_the_program_that_was_written(
    made: tuple[Any, ExportedProgram], saved: Path, tmp_path: Path
) -> None:
    program = made[1]
    again = qcompile.import_quantized(load_checkpoint(saved), (), batch(), dtype=torch.float32)
    torch.testing.assert_close(again.module()(**batch()).logits, program.module()(**batch()).logits)
    ours, theirs = ProgramReport.of(program), ProgramReport.of(again)
    assert theirs.coverage == ours.coverage == {"linear": (7, 8), "attention": (0, 1)}
    fired = [qcompile.export_onnx(p, tmp_path / f"{i}.onnx").fired for i, p in enumerate((program, again))]
    assert fired[1]["MergeParallelLinears"] == 2  # q, k and v, with a copy of one factor each; gate and up
    assert fired[0]["MergeParallelLinears"] == 2


@pytest.mark.everyday(1)
@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            "weight_quantizer._svdquant_lora_a",
            lambda t: t[:4],
            r"lora_b has the shape \[128, 24\], expected \[128, 4\]",
        ),
        ("weight_quantizer._svdquant_lora_b", lambda t: t * float("nan"), "lora_b holds NaN or infinity"),
        ("weight_quantizer._svdquant_lora_b", None, "lora_b is missing"),
        ("pre_quant_scale", lambda t: t * 2, "is not 1 everywhere"),
    ],
)
def test_broken_files_are_refused(saved: Path, tmp_path: Path, key: str, change: Any, message: str) -> None:
    tensors, name = read(saved), f"model.layers.0.self_attn.q_proj.{key}"
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    for file in saved.glob("*.json"):
        if "index" not in file.name:
            (tmp_path / file.name).write_text(file.read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.everyday(1)
@pytest.mark.parametrize("format", ["compressed-tensors", "fp8"])
def test_formats_without_words_for_it_refuse(made: tuple[Any, ExportedProgram], tmp_path: Path, format: Any) -> None:
    with pytest.raises(CheckpointError, match=r"beside a low-rank part.*has no words for a low-rank part"):
        qcompile.save_checkpoint(made[1], tmp_path / "out", format=format, source=made[0], progress=False)


def test_a_directory_needs_a_program(made: tuple[Any, ExportedProgram], tmp_path: Path) -> None:
    recipe = qcompile.load_recipe("nvfp4_weight_only", ["calibration={algorithm: svdquant, weighting: none}"])
    with pytest.raises(CheckpointError, match="svdquant needs calibration data"):
        qcompile.save_checkpoint(made[0], tmp_path / "out", format="modelopt", recipe=recipe, progress=False)
