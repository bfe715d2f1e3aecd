"""Decoders with keys and values in buffers of a fixed length: transformers' text, and ONNX Runtime step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import qcompile
from qcompile.capture import capture
from qcompile.decoders import Cache, decoder_of
from qcompile.errors import CalibrationError, CaptureError
from qcompile.quantization.quantize import quantize

transformers = pytest.importorskip("transformers")
LENGTH = 48
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 64, "num_hidden_layers": 1,
}  # fmt: skip
CACHE = Cache("static", length=LENGTH)


def model_of(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = {
        "llama": lambda: transformers.LlamaConfig(**SIZES),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **{**SIZES, "num_hidden_layers": 2}, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        ),
    }[kind]()
    config.pad_token_id = config.eos_token_id = None
    return transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype)


def inputs(ids: Tensor, mask: Tensor, before: int) -> dict[str, Tensor]:
    """New tokens `ids` behind `before` others; `mask` is of all of them."""
    whole = torch.zeros(len(ids), LENGTH, dtype=torch.int64)
    whole[:, : mask.shape[1]] = mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, before:]
    return {
        "input_ids": ids, "attention_mask": whole, "position_ids": positions, "cache_position": torch.tensor([before]),
    }  # fmt: skip


class Steps:
    """A file, run with the state of the step before."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self.session = qcompile.onnx_session(path)
        self.values, self.names = onnxruntime.OrtValue, [output.name for output in self.session.get_outputs()]

    def __call__(self, given: dict[str, Tensor], past: list[dict[str, Any]]) -> tuple[Tensor, list[dict[str, Any]]]:
        binding = self.session.io_binding()
        state = {f"past_key_values.{i}.{name}": value for i, layer in enumerate(past) for name, value in layer.items()}
        for name, value in {**given, **state}.items():
            binding.bind_ortvalue_input(name, self.value(value))
        for name in self.names:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        found = dict(zip(self.names, binding.get_outputs(), strict=True))
        present = [{name: found[f"present.{i}.{name}"] for name in layer} for i, layer in enumerate(past)]
        return torch.from_numpy(found["logits"].numpy()), present

    def value(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dtype is torch.float8_e4m3fn:
            codes = value.contiguous().view(torch.uint8).numpy()
            return self.values.ortvalue_from_numpy_with_onnx_type(codes, 17)
        return self.values.ortvalue_from_numpy(value.contiguous().numpy())


def empty(program: ExportedProgram, rows: int) -> list[dict[str, Tensor]]:
    assert program.example_inputs is not None
    layers = program.example_inputs[1]["past_key_values"]
    return [{name: part[:1].expand(rows, -1, -1, -1).clone() for name, part in layer.items()} for layer in layers]


def chunks(rows: int) -> Iterator[int]:
    """Prefill, a chunk, and single tokens."""
    yield from (7, 3, *[1] * 32)


@pytest.mark.everyday(2)
@pytest.mark.parametrize("kind", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_the_text_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    decoder = decoder_of(model, CACHE)
    program = capture(decoder.module, (), decoder.kwargs, dynamic_shapes=decoder.dynamic_shapes)
    qcompile.export_onnx(program, tmp_path / "m.onnx", target="portable")
    ids, mask = torch.randint(0, 64, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, :3] = 0
    wanted = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=33, do_sample=False)[:, 7:]
    step, past, found, new, before = Steps(tmp_path / "m.onnx"), empty(program, 2), [], ids, 0
    for _ in range(33):
        logits, past = step(inputs(new, mask, before), past)
        before, new = before + new.shape[1], logits[:, -1].argmax(-1)[:, None]
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        found.append(new)
    assert torch.equal(torch.cat(found, 1), wanted)


@pytest.mark.everyday(2)
@pytest.mark.parametrize(
    ("recipe", "codes", "target"),
    [
        ("fp8+fp8_kv", torch.float8_e4m3fn, "portable"),
        pytest.param("int8+int8_kv", torch.int8, "portable", marks=pytest.mark.slow),
        pytest.param("fp8+fp8_kv", torch.float8_e4m3fn, "tensorrt", marks=pytest.mark.slow),
        pytest.param("int8+int8_kv", torch.int8, "tensorrt", marks=pytest.mark.slow),
    ],
)
def test_every_step_is_that_of_the_program(recipe: str, codes: torch.dtype, target: Any, tmp_path: Path) -> None:
    chosen = qcompile.load_recipe(recipe, ["calibration.power_of_two=true"])
    batch = {"input_ids": torch.randint(0, 64, (2, 16))}
    program = quantize(model_of(), recipe=chosen, calibration=[batch], cache=CACHE, dtype=torch.float32, progress=False)
    qcompile.export_onnx(program, tmp_path / "m.onnx", target=target)
    past, run, before = empty(program, 2), program.module(), 0
    assert past[0]["key"].dtype is past[0]["value"].dtype is codes
    step, present = Steps(tmp_path / "m.onnx"), past
    for count in chunks(2):
        mask = torch.ones(2, before + count, dtype=torch.int64)
        mask[1, :2] = 0
        given = inputs(torch.randint(0, 64, (2, count)), mask, before)
        wanted = run(**given, past_key_values=past)
        logits, present = step(given, present)
        past, before = wanted["present"], before + count
        shown = mask[:, -count:].bool()  # what padding attends to is nobody's
        torch.testing.assert_close(logits[shown], wanted["logits"][shown], rtol=0, atol=1e-5)
        assert all(_bytes(a[name]) == _bytes(b[name]) for a, b in zip(past, present, strict=True) for name in a)
    behind = inputs(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, LENGTH, dtype=torch.int64), LENGTH - 1)
    behind["cache_position"] += 1
    with pytest.raises(IndexError, match="out of bounds"):
        run(**behind, past_key_values=past)


def _bytes(value: Any) -> bytes:
    if isinstance(value, Tensor):
        return bytes(value.contiguous().view(torch.uint8).numpy().tobytes())
    return bytes(np.ascontiguousarray(value.numpy()).tobytes())


def test_what_does_not_fit_is_said() -> None:
    model = model_of()
    with pytest.raises(CaptureError, match=r"a cache of 65 tokens is longer than the 64 positions of LlamaForCausalLM"):
        quantize(model, recipe="int8", cache=Cache("static", length=65), progress=False)
    batch = {"input_ids": torch.zeros(1, LENGTH + 1, dtype=torch.int64)}
    with pytest.raises(CalibrationError, match=r"49 tokens are more than the cache has room for, 48: .*length=49"):
        quantize(model, recipe="int8+int8_kv", calibration=[batch], cache=CACHE, progress=False)
    with pytest.raises(CaptureError, match="2 tokens or more"):
        Cache("static", length=1)
