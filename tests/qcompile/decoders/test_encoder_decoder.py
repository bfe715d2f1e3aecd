"""Encoders with decoders become two programs, and what the decoder reads of the encoder is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
import transformers

import qcompile
from passes.graph import aten
from qcompile.decoders import Cache, captured_with_cache
from qcompile.decoders.encoder_decoder import parts_of
from qcompile.errors import CalibrationError, CaptureError

_IDS: dict[str, Any] = {"vocab_size": 128, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
_LAYERS = {f"{part}_layers": 2 for part in ("encoder", "decoder")}
_HEADS = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
_WIDTHS = {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, **_LAYERS, **_HEADS}


def _whisper() -> Any:
    config = transformers.WhisperConfig(**_IDS, **_WIDTHS, bos_token_id=1, num_mel_bins=16, max_source_positions=20)
    return transformers.WhisperForConditionalGeneration(config)


def _t5() -> Any:
    config = transformers.T5Config(**_IDS, d_model=64, d_kv=16, num_layers=2, num_heads=4, d_ff=96)
    return transformers.T5ForConditionalGeneration(config)


def _marian() -> Any:
    return transformers.MarianMTModel(transformers.MarianConfig(**_IDS, **_WIDTHS))


def _features(rows: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(rows, 16, 40)}


def _text(rows: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[0, -1] = 0
    return {"input_ids": torch.randint(3, 128, (rows, length)), "attention_mask": mask}


Inputs = Callable[[int, int], dict[str, torch.Tensor]]
MODELS: dict[str, tuple[Callable[[], Any], Inputs]] = {
    "whisper": (_whisper, _features),
    "t5": (_t5, _text),
    "marian": (_marian, _text),
}
TABLE = [name if name == "t5" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


def model_of(name: str) -> tuple[Any, Inputs]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    return make().eval(), inputs


@pytest.mark.parametrize("name", TABLE)
def test_step_by_step_it_gives_what_the_whole_gives(name: str) -> None:
    model, inputs = model_of(name)
    example = inputs(2, 9)
    encoder, decoder = (
        captured_with_cache(model, Cache(part=part), None, None, example)[0] for part in ("encoder", "decoder")
    )
    parts, given = parts_of(model, Cache(part="decoder"), example), inputs(3, 6)
    ids = torch.randint(3, 128, (3, 7))
    with torch.no_grad():
        wanted = model(**given, decoder_input_ids=ids).logits
        layers = encoder.module()(**given)["present"]
        past = [{"decoder": {k: v[:, :, :0] for k, v in layer["encoder"].items()}, **layer} for layer in layers]
        start = 0
        for new in (4, 1, 1, 1):
            step = decoder.module()(**parts.step(given, ids[:, start : start + new], past))
            torch.testing.assert_close(step["logits"], wanted[:, start : start + new], rtol=1e-4, atol=1e-5)
            past = [{**old, **present} for old, present in zip(past, step["present"], strict=True)]
            start += new
    linears = decoder.graph.find_nodes(op="call_function", target=aten.linear.default)
    crossing = ("encoder_attn.k_proj", "encoder_attn.v_proj", "EncDecAttention.k", "EncDecAttention.v")
    assert linears
    assert not [n for n in linears if any(part in str(n.meta["nn_module_stack"]) for part in crossing)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_both_parts_go_to_files_with_names_that_fit(name: str, tmp_path: Any) -> None:
    model, inputs = model_of(name)
    example = inputs(2, 9)
    batches = [{**inputs(2, 9), "decoder_input_ids": torch.randint(3, 128, (2, 6))} for _ in range(2)]
    names: dict[str, tuple[set[str], set[str]]] = {}
    for part, recipe in (("encoder", "fp8"), ("decoder", "fp8+fp8_kv")):
        options: Any = {"recipe": recipe, "calibration": batches, "cache": Cache(part=part), "progress": False}
        program = qcompile.quantize(model, kwargs=example, **options)
        report = qcompile.export_onnx(program, tmp_path / f"{part}.onnx", target="portable")
        graph = onnx.load(tmp_path / f"{part}.onnx").graph
        names[part] = {value.name for value in graph.input}, {value.name for value in graph.output}
        if part == "decoder":
            assert report.coverage["cache"] == (4, 4)
            assert report.coverage["attention"] == (4, 4)
    taken, given = names["decoder"]
    assert {name.replace("present", "past_key_values") for name in names["encoder"][1] | given - {"logits"}} <= taken


def test_what_is_missing_is_told() -> None:
    model, inputs = model_of("t5")
    with pytest.raises(CaptureError, match="two programs: quantize it twice"):
        captured_with_cache(model, Cache(), None, None, inputs(1, 4))
    with pytest.raises(CaptureError, match="give an example of it, kwargs="):
        captured_with_cache(model, Cache(part="encoder"), None, None, {})
    with pytest.raises(CaptureError, match="a static one is not supported"):
        captured_with_cache(model, Cache("static", 16, part="decoder"), None, None, inputs(1, 4))
    _, batches = captured_with_cache(model, Cache(part="decoder"), [inputs(1, 4)], None, inputs(1, 4))
    with pytest.raises(CalibrationError, match="batch 0 has no decoder_input_ids"):
        next(iter(batches))
