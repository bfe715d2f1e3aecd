"""Vision-language models whole: image features merged into the text, quantized, run by ONNX Runtime and built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import qcompile

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

IMAGE, COUNT = 5, 4  # the token that stands for an image, and how many of them one takes
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
VISION = {**SIZES, "image_size": 28, "patch_size": 14}


def llava() -> torch.nn.Module:
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config)  # type: ignore[no-any-return]


def gemma3() -> torch.nn.Module:
    text = transformers.Gemma3TextConfig(**TEXT, head_dim=16, sliding_window=8)
    vision = transformers.SiglipVisionConfig(**VISION)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, mm_tokens_per_image=COUNT
    )
    config.image_token_id = IMAGE
    return transformers.Gemma3ForConditionalGeneration(config)  # type: ignore[no-any-return]


def paligemma() -> torch.nn.Module:
    vision = transformers.SiglipVisionConfig(**VISION, projection_dim=64)
    text = transformers.GemmaConfig(**TEXT, head_dim=16)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=64
    )
    config.image_token_id = IMAGE
    return transformers.PaliGemmaForConditionalGeneration(config)  # type: ignore[no-any-return]


def internvl() -> torch.nn.Module:
    vision = transformers.InternVLVisionConfig(**{**VISION, "image_size": [28, 28], "patch_size": [7, 7]})
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=transformers.Qwen2Config(**TEXT), image_token_id=IMAGE
    )
    return transformers.InternVLForConditionalGeneration(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("build", [llava, gemma3, paligemma, internvl])
def test_whole_models(build: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build().eval()
    ids = torch.tensor([[1, 2, *[IMAGE] * COUNT, 3, 4, 7, 8, 9, 10]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28), "attention_mask": torch.ones_like(ids)}
    if build in (gemma3, paligemma):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    program = qcompile.quantize(model, kwargs=inputs, calibration=[inputs], progress=False)
    with torch.no_grad():
        want, float_logits = program.module()(**inputs), model(**inputs).logits
    want = getattr(want, "logits", want)
    assert (want - float_logits).norm() < 0.15 * float_logits.norm()

    report = qcompile.export_onnx(program, tmp_path / "portable.onnx", target="portable")
    assert set(report.unquantized) <= {"lm_head"}
    assert report.coverage["attention"] == (4, 4)
    session = qcompile.onnx_session(tmp_path / "portable.onnx")
    (got,) = session.run(["logits"], {each.name: inputs[each.name].numpy() for each in session.get_inputs()})
    assert np.linalg.norm(got - want.numpy()) < 0.05 * np.linalg.norm(want.numpy())

    report = qcompile.export_onnx(program, tmp_path / "tensorrt.onnx", target="tensorrt")
    assert "NonZero" not in report.ops
    pytest.importorskip("tensorrt_rtx")
    engine = qcompile.build_engine(tmp_path / "tensorrt.onnx", target="sm89", progress=False)
    assert engine.attention.total == 4
