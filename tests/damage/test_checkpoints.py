"""700 damaged safetensors files, indexes and configs: a clear error, or what the safetensors library reads."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qcompile.checkpoint.files.headers import open_directory, read_header
from qcompile.checkpoint.hub.origin import open_origin
from qcompile.source.load import load_source
from tests.damage.support import judge, mutated_bytes, mutated_tree

INDEX = "model.safetensors.index.json"
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


def as_the_library_reads_it(path: Path) -> None:
    found = read_header(path)
    with safe_open(path, "pt") as library:
        assert set(found) == set(library.keys())
        for name, tensor in found.items():
            expected = library.get_tensor(name)
            assert tensor.shape == tuple(expected.shape) and tensor.dtype == expected.dtype
            read = torch.frombuffer(bytearray().join(tensor.chunks()) or bytearray(1), dtype=torch.uint8)
            assert torch.equal(read[: tensor.nbytes], expected.contiguous().reshape(-1).view(torch.uint8))


@pytest.mark.slow
def test_400_safetensors_files(tmp_path: Path) -> None:
    draw = random.Random(160)
    tensors = {"a": torch.rand(3, 4), "b.c": torch.arange(5), "d": torch.rand(2).bfloat16(), "e": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "good", {"format": "pt"})
    data = (tmp_path / "good").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    cases = []
    for number in range(400):
        if number % 4 == 0:
            text = json.dumps(mutated_tree(json.loads(header), draw)).encode()
        elif number % 4 == 1:
            text = mutated_bytes(header, draw)
        else:
            text = b""
        whole = len(text).to_bytes(8, "little") + text + values if text else mutated_bytes(data, draw)
        cases.append(tmp_path / f"{number}.safetensors")
        cases[-1].write_bytes(whole)
    outcomes = judge(cases, as_the_library_reads_it)
    assert outcomes["refused"] > 200 and outcomes["right"] > 10  # a changed value is no damage that one can see


@pytest.mark.slow
def test_200_indexes(tmp_path: Path) -> None:
    draw, whole = random.Random(161), tmp_path / "whole"
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    model.save_pretrained(whole, max_shard_size="2KB")
    index, places = (whole / INDEX).read_bytes(), json.loads((whole / INDEX).read_text())
    weights = {name: tensor for file in whole.glob("*.safetensors") for name, tensor in load_file(file).items()}
    cases = []
    for number in range(200):
        cases.append(Path(shutil.copytree(whole, tmp_path / str(number))))
        changed = mutated_bytes(index, draw) if number % 2 else json.dumps(mutated_tree(places, draw)).encode()
        (cases[-1] / INDEX).write_bytes(changed)

    def as_they_were(directory: Path) -> None:
        loaded = load_source(str(directory)).model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
        for name, stored in open_directory(directory).items():
            assert torch.equal(stored.rows(0, stored.shape[0]), weights[name])

    outcomes = judge(cases, as_they_were)
    assert outcomes["refused"] > 50 and outcomes["right"] > 5


@pytest.mark.slow
def test_100_configs(tmp_path: Path) -> None:
    draw, whole = random.Random(164), tmp_path / "whole"
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(whole)
    config = json.loads((whole / "config.json").read_text())
    parts = {"text_config": {"quantization_config": None}, "quantization_config": None, "attn_implementation": "eager"}
    cases = []
    for number in range(100):
        cases.append(Path(shutil.copytree(whole, tmp_path / str(number))))
        changed = mutated_tree({**config, **parts, "architectures": config["architectures"] * 2}, draw)
        (cases[-1] / "config.json").write_text(json.dumps(changed))

    def opens(directory: Path) -> None:
        load_source(str(directory))
        open_origin(directory)

    outcomes = judge(cases, opens)
    assert outcomes["refused"] > 20 and outcomes["right"] > 5
