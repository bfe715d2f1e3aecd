"""Configurations of quantized checkpoints that somebody else wrote, or damaged."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

import qcompile
from tests.damage.support import judge, mutated_bytes, mutated_tree
from tests.qcompile.checkpoint.models import save, tiny

pytest.importorskip("transformers")

RECIPES = {
    "fp8": "fp8_block",
    "modelopt": "nvfp4_weight_only",
    "modelopt_mixed": "fp8_per_channel_per_token",
    "compressed-tensors": "int8_per_channel_per_token",
}
FILES = ("config.json", "hf_quant_config.json", "generation_config.json", "model.safetensors.index.json")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of each format, of two shards."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    source = save(tiny("llama", num_hidden_layers=1), folder / "source")
    (source / "tokenizer.json").unlink()
    made = [source]
    for format, recipe in RECIPES.items():
        qcompile.save_checkpoint(
            source, folder / format, format=format, recipe=recipe, max_shard_size="100KB", progress=False
        )
        made.append(folder / format)
    return made


def load(directory: Path) -> None:
    """Loaded as a quantized checkpoint, or as what one is made of."""
    if (directory / "plain").exists():
        written = directory.with_name(f"{directory.name}-written")
        try:
            qcompile.save_checkpoint(directory, written, progress=False)
        finally:
            shutil.rmtree(written, ignore_errors=True)
        return
    model = qcompile.load_checkpoint(directory)
    assert all(not parameter.is_meta for parameter in model.parameters())


@pytest.mark.slow
def test_mutated_configurations(checkpoints: list[Path], tmp_path: Path) -> None:
    draw, cases = random.Random(16), []
    for number in range(600):
        source, case = draw.choice(checkpoints), tmp_path / str(number)
        case.mkdir()
        for path in source.iterdir():
            if path.is_file():
                (case / path.name).hardlink_to(path)
        if source.name == "source":
            (case / "plain").touch()
        present = [name for name in FILES if (case / name).exists()]
        name = draw.choice([*present, "config.json", "config.json"])
        old = (source / name).read_bytes()
        tree = json.loads(old)
        (case / name).unlink()
        if number % 4 == 0:
            changed = mutated_bytes(old, draw)
        elif number % 4 == 1 and "quantization_config" in tree:
            changed = json.dumps(
                {**tree, "quantization_config": mutated_tree(tree["quantization_config"], draw)}
            ).encode()
        else:
            changed = json.dumps(mutated_tree(tree, draw)).encode()
        (case / name).write_bytes(changed)
        cases.append(case)
    outcomes = judge(cases, load)
    assert min(outcomes["right"], outcomes["refused"]) > 100, outcomes
