"""Each format and recipe through the loaders of servers: all weights arrive, or a notice said that they do not.

The pins of vLLM, SGLang and TensorRT Edge-LLM exclude ours, so each has a Python of its own, named by the variables of
`PYTHONS` (docs/checkpoints.md says how to make them). No GPU is needed: loading runs no kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.checkpoint.formats import FORMATS
from qcompile.checkpoint.formats.servers import EDGE, SGLANG, VLLM
from qcompile.checkpoint.write.save import save_checkpoint
from qcompile.errors import CheckpointError
from qcompile.recipe import list_recipes
from tests.qcompile.checkpoint.models import batch, save, tiny

PYTHONS = {VLLM: "QCOMPILE_VLLM_PYTHON", SGLANG: "QCOMPILE_SGLANG_PYTHON", EDGE: "QCOMPILE_EDGELLM_PYTHON"}
SCRIPTS = {VLLM: "load_vllm.py", SGLANG: "load_sglang.py", EDGE: "load_edgellm.py"}
SAME = ("int8_attention", "int8_fast", "nvfp4_fast")  # whose checkpoints have the form of another's
RECIPES = [name for name in list_recipes() if name not in SAME]


pytestmark = pytest.mark.skipif(
    not any(os.environ.get(name) for name in PYTHONS.values()), reason=f"none of {', '.join(PYTHONS.values())} is set"
)


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, list[str]]:
    """A checkpoint of each recipe in each format that holds it: its directory -> the notices of its report."""
    family, folder = request.param, tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model, found = tiny(family, num_hidden_layers=1, tie_word_embeddings=False), {}
    source = save(model, folder / "source")
    for recipe in RECIPES:
        options: Any = {"recipe": recipe, "calibration": [batch()], "dtype": torch.float32, "progress": False}
        program = qcompile.quantize(model, (), batch(), **options)
        for fmt in FORMATS:
            directory = folder / f"{fmt}--{recipe}"
            try:
                report = save_checkpoint(program, directory, format=fmt, source=source, progress=False)  # type: ignore[arg-type]
            except CheckpointError:
                continue
            found[directory] = report.notices
    return found


@pytest.mark.slow
@pytest.mark.parametrize("server", PYTHONS)
def test_all_weights_arrive_or_a_notice_says_so(written: dict[Path, list[str]], server: str) -> None:
    python = os.environ.get(PYTHONS[server])
    if not python:
        pytest.skip(f"{PYTHONS[server]} names no Python that has {server}")
    script = Path(__file__).with_name(SCRIPTS[server])
    run = subprocess.run([python, script, *written], capture_output=True, text=True, check=False)
    lines = [line.partition("RESULT ")[2] for line in run.stdout.splitlines() if "RESULT " in line]
    results = {result["directory"]: result for result in map(json.loads, lines)}
    assert results.keys() == {path.name for path in written}, run.stderr[-3000:]
    wrong = {
        name: (result["error"], result["lost"]) for name, result in results.items() if result["error"] or result["lost"]
    }
    told = {path.name for path, notices in written.items() if any(server in notice for notice in notices)}
    assert wrong.keys() == told, wrong
