"""Decoders of transformers are captured with their caches: one program for prompts, chunks and single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

import qcompile
from passes.base import run_pipeline
from passes.pipelines import NORMALIZE
from passes.program import unlift
from passes.state import cache_kind, states
from qcompile.decoders import Cache, Decoder, as_cache, captured_with_cache, decoder_of
from qcompile.errors import CaptureError
from tests.qcompile.decoders.models import CONFIGS, decoder, tokens

PROMPT, STEPS = 13, 12  # more together than the windows of 8


def captured(model: Any, **options: Any) -> tuple[Decoder, ExportedProgram]:
    cache = Cache(**options)
    program, _ = captured_with_cache(model, cache, None)
    return decoder_of(model, cache), program


def greedy(made: Decoder, program: ExportedProgram, ids: torch.Tensor, mask: torch.Tensor, chunk: int) -> torch.Tensor:
    """Tokens of `STEPS` steps behind a prompt that is given in pieces of `chunk`."""
    step, past, logits = program.module(), None, torch.empty(0)
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            part = {"input_ids": ids[:, start : start + chunk], "attention_mask": mask[:, : start + chunk]}
            logits, past = step(**made.inputs(part, past, start)).values()
        for _ in range(STEPS):
            new = logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            logits, past = step(
                **made.inputs({"input_ids": new, "attention_mask": mask}, past, mask.shape[1] - 1)
            ).values()
    return ids


EVERYDAY = ("llama", "gemma3")


@pytest.mark.parametrize("family", [f if f in EVERYDAY else pytest.param(f, marks=pytest.mark.slow) for f in CONFIGS])
def test_it_generates_what_transformers_does(family: str) -> None:
    model = decoder(family)
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0  # padding on the left
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(ids, attention_mask=mask, **options)
    made, program = captured(model)
    for chunk in (PROMPT, 5):
        assert torch.equal(greedy(made, program, ids, mask, chunk), wanted)
    gm = unlift(program)
    run_pipeline(NORMALIZE, gm)
    kinds = [cache_kind(state.update) for state in states(gm.graph)]
    assert sorted(map(str, kinds)) == ["k"] * len(made.layers) + ["v"] * len(made.layers)
    assert model.config.use_cache


def test_names_of_modules_are_those_of_the_model() -> None:
    model = decoder("llama")
    _, program = captured(model)
    assert set(program.state_dict) <= set(model.state_dict())
    stacks = [node.meta.get("nn_module_stack", {}) for node in program.graph.nodes]
    paths = {path for stack in stacks for path, _ in stack.values()}
    assert "model.layers.1.self_attn.q_proj" in paths


def test_logits_of_the_last_position_alone() -> None:
    made, program = captured(decoder("llama"), logits="last")
    ids = tokens(2, 9)
    assert program.module()(**made.inputs({"input_ids": ids}))["logits"].shape == (2, 1, 128)


def test_what_is_no_decoder_is_refused() -> None:
    with pytest.raises(CaptureError, match="cache= is for models of transformers that generate, not for Linear"):
        decoder_of(torch.nn.Linear(2, 2), Cache())
    with pytest.raises(CaptureError, match="leave dynamic_shapes out"):
        captured_with_cache(decoder("llama"), Cache(), None, {"input_ids": None})


@pytest.mark.parametrize(
    ("cache", "told"),
    [
        ("dynamc", "unknown kind of cache 'dynamc'; known: dynamic, static"),
        ("static", "a static cache has a length"),
        (True, 'cache is "dynamic", "static" or a qcompile.Cache, not True'),
    ],
)
def test_options_that_are_none(cache: Any, told: str) -> None:
    with pytest.raises(CaptureError, match=told):
        as_cache(cache)
    with pytest.raises(CaptureError, match="no length"):
        Cache("dynamic", 16)
    with pytest.raises(CaptureError, match="a cache of length 0 holds no past"):
        Cache("static", 0)


def test_a_saved_program_goes_to_a_file(tmp_path: Path) -> None:
    options: Any = {"recipe": "fp8+fp8_kv", "calibration": [{"input_ids": tokens(2, 12)}], "progress": False}
    program = qcompile.quantize(decoder("llama"), cache="dynamic", **options)
    torch.export.save(program, tmp_path / "saved.pt2")
    loaded = torch.export.load(tmp_path / "saved.pt2")
    report = qcompile.export_onnx(loaded, tmp_path / "model.onnx", target="portable")
    assert report.coverage["cache"] == (4, 4)
