"""Scales of a key/value cache in checkpoints are those of the program's cache, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qcompile
from passes.constants import constant
from passes.program import unlift
from passes.reading import Operand
from passes.state import states
from tests.qcompile.decoders.models import decoder, tokens

BATCHES = [{"input_ids": tokens(2, 12)}]


@pytest.mark.parametrize("fmt", ["modelopt", pytest.param("compressed-tensors", marks=pytest.mark.slow)])
def test_a_program_with_a_cache_is_saved_and_comes_back(fmt: str, tmp_path: Path) -> None:
    model = decoder("llama")
    options = {"recipe": "fp8+fp8_kv", "calibration": BATCHES, "progress": False, "dtype": torch.float32}
    program = qcompile.quantize(model, cache="dynamic", **options)
    model.save_pretrained(tmp_path / "source")
    report = qcompile.save_checkpoint(program, tmp_path / "saved", source=tmp_path / "source", format=fmt)
    assert report.kv_cache
    loaded = qcompile.load_checkpoint(tmp_path / "saved")
    again = qcompile.import_quantized(loaded, cache="dynamic", calibration=BATCHES, dtype=torch.float32, progress=False)
    assert _scales(again) == pytest.approx(_scales(program))
    kwargs = program.example_inputs[1]
    with torch.no_grad():
        first, second = program.module()(**kwargs), again.module()(**kwargs)
    for layer, other in zip(first["present"], second["present"], strict=True):
        assert layer["key"].dtype is other["key"].dtype is torch.float8_e4m3fn
    torch.testing.assert_close(first["logits"], second["logits"], rtol=0.02, atol=0.02)
    files = load_file(next((tmp_path / "saved").glob("*.safetensors")))
    assert sum("k_scale" in name or "k_proj.k_scale" in name for name in files) == 2


def _scales(program: torch.export.ExportedProgram) -> list[float]:
    gm = unlift(program)
    found = []
    for state in states(gm.graph):
        (read,) = (operand for user in state.update.users if (operand := Operand.read(user)) is not None)
        scale = constant(gm, read.scale)
        assert scale is not None
        found.append(float(scale))
    return found
