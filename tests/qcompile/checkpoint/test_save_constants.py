"""Activations whose range the recipe says: no calibration, and a key/value cache that is cast."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.checkpoint.write.save import save_checkpoint
from qcompile.errors import CheckpointError
from tests.qcompile.checkpoint.models import batch, read, same, save, tiny

CAST = qcompile.load_recipe("nvfp4_weight_only", ["rules[+]={import: fp8_kv_cast}"])
SCALES = {
    "modelopt": [f"model.layers.0.self_attn.{n}_proj.{n}_scale" for n in "kv"],
    "compressed-tensors": [f"model.layers.0.self_attn.{n}_scale" for n in "kv"],
}


@pytest.mark.everyday(2)
def test_a_cast_key_value_cache_has_the_scale_1(tmp_path: Path) -> None:
    """From a directory and from a program, that no calibration saw either."""
    model = tiny("llama", num_hidden_layers=1)
    source = save(model, tmp_path / "source")
    program = qcompile.quantize(model, (), batch(), recipe=CAST, dtype=torch.float32, progress=False)
    for fmt, names in SCALES.items():
        report = save_checkpoint(source, tmp_path / fmt, format=fmt, recipe=CAST, progress=False)  # type: ignore[arg-type]
        assert report.kv_cache
        tensors = read(tmp_path / fmt)
        assert [float(tensors[name]) for name in names] == [1, 1]
        save_checkpoint(program, tmp_path / f"{fmt}-program", format=fmt, source=source, progress=False)  # type: ignore[arg-type]
        assert all(same(tensor, tensors[name]) for name, tensor in read(tmp_path / f"{fmt}-program").items())
    attention: Any = qcompile.load_checkpoint(tmp_path / "modelopt").get_submodule("model.layers.0.self_attn")
    assert (float(attention.k_scale), float(attention.v_scale)) == (1, 1)


@pytest.mark.slow
def test_the_preset_of_model_optimizer(tmp_path: Path) -> None:
    """It writes the configuration and no scales, for which servers take 1; ours has them, and all else is the same."""
    export, mtq = pytest.importorskip("modelopt.torch.export"), pytest.importorskip("modelopt.torch.quantization")
    recipes = pytest.importorskip("modelopt.recipe")
    model, ids = tiny("llama", torch.float32, num_hidden_layers=1), batch()
    save_checkpoint(model, tmp_path / "ours", format="modelopt", recipe=CAST, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = recipes.load_recipe("general/ptq/nvfp4_weight_only-kv_fp8_cast").quantize.model_dump()
        mtq.quantize(model, config, lambda m: m(**ids))
        export.export_hf_checkpoint(model, dtype=torch.float32, export_dir=tmp_path / "theirs")
    ours, theirs = read(tmp_path / "ours"), read(tmp_path / "theirs")
    assert ours.keys() - theirs.keys() == set(SCALES["modelopt"]) and not theirs.keys() - ours.keys()
    assert all(same(tensor, ours[name]) for name, tensor in theirs.items())
    sections = [
        json.loads((tmp_path / side / "config.json").read_text())["quantization_config"] for side in ("ours", "theirs")
    ]
    assert sections[0] == sections[1]
    attention: Any = qcompile.load_checkpoint(tmp_path / "theirs").get_submodule("model.layers.0.self_attn")
    assert (float(attention.k_scale), float(attention.v_scale)) == (1, 1)


def test_inputs_have_the_scale_of_the_recipe(tmp_path: Path) -> None:
    """NVFP4 with activations, without data: 2688 is the global scale 1."""
    rules = [
        {"quantizer": "*.mlp.*weight_quantizer", "format": "nvfp4"},
        {"quantizer": "*.mlp.*input_quantizer", "format": "nvfp4", "constant_amax": 2688},
    ]
    recipe = {"metadata": {"name": "w4a4", "description": "NVFP4 without data."}, "rules": rules}
    save_checkpoint(tiny("llama"), tmp_path / "out", format="modelopt", recipe=recipe, progress=False)
    found = {name: float(t) for name, t in read(tmp_path / "out").items() if name.endswith("input_scale")}
    assert len(found) == 6 and set(found.values()) == {1.0}


def test_one_of_k_and_v_is_refused(tmp_path: Path) -> None:
    rule = 'rules[+]={quantizer: "*.k_bmm_quantizer", format: fp8, constant_amax: 448}'
    recipe = qcompile.load_recipe("nvfp4_weight_only", [rule])
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn: one of k and v is quantized to FP8"):
        save_checkpoint(tiny("llama"), tmp_path / "out", format="modelopt", recipe=recipe, progress=False)
