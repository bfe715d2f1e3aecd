"""Files beside a decoder's ONNX file, and onnxruntime-genai's own run of the directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qcompile
from qcompile.generation.decoder_file import DecoderFile
from qcompile.generation.directory import companions, genai_config
from qcompile.generation.settings import Settings


def test_the_directory_has_what_runtimes_want(made: Callable[..., Any], llama: Path, tmp_path: Path) -> None:
    folder, _ = made(None)
    assert {path.name for path in folder.iterdir()} == {
        *("model.onnx", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        "genai_config.json",
    }
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("llama", 258, 96)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (256, 256, 257)
    decoder = model["decoder"]
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    assert [decoder[name] for name in sizes] == [16, 32, 2, 1, 1]
    assert Settings.read(folder) == Settings(frozenset([256]), 257, 96)
    (tmp_path / "tokenizer.json").symlink_to(llama / "tokenizer.json")
    (tmp_path / "config.json").write_text("{}")
    assert [path.name for path in companions(tmp_path)] == ["config.json"], "no link that leads out is followed"
    kind = genai_config(DecoderFile.read(folder / "model.onnx"), {"model_type": "mixtral"}, Settings())["model"]["type"]
    assert kind == "decoder"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("recipe", [None, "fp8+fp8_kv", "int8+int8_kv"])
def test_onnxruntime_genai_finds_the_same_tokens(made: Callable[..., Any], recipe: str | None, dtype: Any) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    folder, _ = made(recipe, dtype)
    model = genai.Model(str(folder))
    for prompt in (b"The quick brown fox", b"Hi", b"?"):
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(prompt) + 40, do_sample=False)
        generator = genai.Generator(model, options)
        generator.append_tokens(np.array([list(prompt)], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found = generator.get_sequence(0)[len(prompt) :].tolist()
        ours = qcompile.Generator(folder).generate(list(prompt), max_new_tokens=40).tokens[0]
        assert found == ours[: len(found)] and len(ours) - len(found) in (0, 1), "genai leaves the end of a text out"
