"""A checkpoint of a smoothed program holds the norms and biases that took the factors, or is not written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import qcompile
from qcompile.errors import CheckpointError
from tests.qcompile.checkpoint.models import batch, read, same, save, tiny


def smoothed(name: str, settings: str) -> qcompile.Recipe:
    return qcompile.load_recipe(name, [f"calibration=[{{algorithm: {settings}}}]"])


@pytest.mark.everyday(2)
def test_transformers_computes_what_the_program_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = tiny("llama", torch.float32, num_key_value_heads=2, num_hidden_layers=1, attention_bias=True), batch()
    torch.nn.init.normal_(model.model.layers[0].self_attn.v_proj.bias)
    source = save(model, tmp_path / "source")
    recipe = smoothed("nvfp4_weight_only", "awq, alpha: 0.6, multiply: false")
    program = qcompile.quantize(model, (), ids, recipe=recipe, calibration=[ids], dtype=torch.float32, progress=False)
    options = {"format": "compressed-tensors", "progress": False}
    qcompile.save_checkpoint(program, tmp_path / "out", source=source, **options)  # type: ignore[arg-type]
    before, after = read(source), read(tmp_path / "out")
    changed = {name for name, tensor in before.items() if name in after and not same(tensor, after[name])}
    norms = {f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")}
    assert changed == norms | {"model.layers.0.self_attn.v_proj.bias"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=transformers.CompressedTensorsConfig(run_compressed=False)
    )
    with torch.no_grad():
        found, expected = theirs(**ids).logits, program.module()(**ids)
        expected = getattr(expected, "logits", expected)
    assert float((found - expected).norm() / expected.norm()) < 5e-3  # who reads it computes in bfloat16
    wrong = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():  # and a reader that had the norms of the source would not
        theirs.model.norm.load_state_dict(wrong.model.norm.state_dict())
        theirs.model.layers[0].input_layernorm.load_state_dict(wrong.model.layers[0].input_layernorm.state_dict())
        assert float((theirs(**ids).logits - expected).norm() / expected.norm()) > 0.03


def test_a_multiplication_that_is_left_is_refused(tmp_path: Path) -> None:
    model, ids = tiny("llama", torch.float32, num_hidden_layers=1, hidden_act="gelu"), batch()
    model.model.layers[0].mlp = transformers.models.clip.modeling_clip.CLIPMLP(
        transformers.CLIPTextConfig(hidden_size=128, intermediate_size=256)
    )
    program = qcompile.quantize(
        model, (), ids, recipe=smoothed("fp8_gemm", "smoothquant, alpha: 0.5"), calibration=[ids], progress=False
    )
    with pytest.raises(CheckpointError, match=r"mlp\.fc2: its input is multiplied .* `multiply: false`"):
        qcompile.save_checkpoint(program, tmp_path / "out", source=model, format="compressed-tensors", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
def test_a_directory_alone_does_not_say_how_large_channels_get(tmp_path: Path, name: str) -> None:
    source = save(tiny("llama", num_hidden_layers=1), tmp_path / "source")
    with pytest.raises(CheckpointError, match=rf"{name} needs calibration data: program = qcompile\.quantize"):
        qcompile.save_checkpoint(
            source, tmp_path / "out", format="compressed-tensors", recipe=smoothed("nvfp4_weight_only", name)
        )
    assert not (tmp_path / "out").exists()
