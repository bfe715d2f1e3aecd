"""INT4 weights as checkpoints, out and in; transformers and compressed-tensors are judges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qcompile
from passes.ir import dequantize
from passes.program import unlift
from passes.reading import QuantizedLayer
from qcompile.checkpoint.load import load_checkpoint
from qcompile.checkpoint.write.save import save_checkpoint
from qcompile.errors import CheckpointError
from tests.qcompile.checkpoint.models import batch, read, save, tiny

RECIPE = ["rules[format=int4].group_size=32"]


def recipe() -> qcompile.Recipe:
    return qcompile.load_recipe("int4_weight_only", RECIPE)


def weights_of(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """What each quantized linear layer multiplies by."""
    gm, found = unlift(program), {}
    for node in gm.graph.nodes:
        if (layer := QuantizedLayer.read(node)) is not None:
            codes, scale = (gm.get_parameter(str(part.target)) for part in layer.weight.parts)
            name = layer.weight.format.name
            found[layer.name] = dequantize(codes, scale, format=name, dtype=layer.weight.node.meta["val"].dtype)
    return found


@pytest.mark.everyday(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_transformers_has_the_weights_of_the_program(dtype: torch.dtype, tmp_path: Path) -> None:
    """In the dtype of the model, whose scales the codes were chosen with: of a directory, and of a program."""
    pytest.importorskip("compressed_tensors")
    model, ids = tiny("llama", dtype, num_hidden_layers=1), batch()
    source = save(model, tmp_path / "source")
    program = qcompile.quantize(model, (), ids, recipe=recipe(), dtype=dtype, progress=False)
    save_checkpoint(source, tmp_path / "out", format="compressed-tensors", recipe=recipe(), progress=False)
    save_checkpoint(program, tmp_path / "same", format="compressed-tensors", source=source, progress=False)
    tensors, expected = read(tmp_path / "out"), weights_of(program)
    assert {k: (v.dtype, v.tolist()) for k, v in tensors.items()} == {
        k: (v.dtype, v.tolist()) for k, v in read(tmp_path / "same").items()
    }
    assert {v.dtype for k, v in tensors.items() if k.endswith("weight_scale")} == {dtype}
    config = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=config, dtype=dtype
    )
    linears = {n: m.weight for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert linears.keys() == expected.keys() and len(linears) == 7
    assert all(torch.equal(linears[name], weight) for name, weight in expected.items())


@pytest.mark.everyday(1)
@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt"])
@torch.no_grad()
def test_a_directory_comes_in_as_it_was_written(format: Any, tmp_path: Path) -> None:
    model, ids = tiny("llama", torch.float32, num_hidden_layers=1), batch()
    source = save(model, tmp_path / "source")
    save_checkpoint(source, tmp_path / "out", format=format, recipe=recipe(), progress=False)
    expected = qcompile.quantize(model, (), ids, recipe=recipe(), dtype=torch.float32, progress=False)
    found = qcompile.import_quantized(load_checkpoint(tmp_path / "out"), (), ids, dtype=torch.float32, progress=False)
    ours, back = weights_of(expected), weights_of(found)
    assert ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)
    report = qcompile.export_onnx(found, tmp_path / "m.onnx", target="portable")
    assert set(report.quantized.values()) == {"int4_32_weight_only"}


def test_a_factor_of_awq_is_refused(tmp_path: Path) -> None:
    import safetensors.torch

    save_checkpoint(
        save(tiny("llama", torch.float32, num_hidden_layers=1), tmp_path / "source"),
        tmp_path / "out",
        format="modelopt",
        recipe=recipe(),
        progress=False,
    )
    name = "model.layers.0.mlp.down_proj"
    tensors = read(tmp_path / "out")
    columns = tensors[f"{name}.weight"].shape[1]
    (file,) = (tmp_path / "out").glob("*.safetensors")
    safetensors.torch.save_file(tensors | {f"{name}.pre_quant_scale": torch.full((columns,), 0.5)}, file)
    with pytest.raises(CheckpointError, match=f"{name}.pre_quant_scale: AWQ left a factor"):
        load_checkpoint(tmp_path / "out")
