"""Tiny vision and speech encoders for the coverage table: every part that the full ones have, random weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.models import Example, Size, images, random_model

TINY = Size(layers=2, hidden=256, heads=8, ffn=512, tokens=56, patch=8)


def clip_vision(*, dynamic: bool = False) -> Example:
    """CLIP's vision tower: a norm before the blocks, quick GELU."""
    config = transformers.CLIPVisionConfig(**_common())
    return images(random_model(partial(transformers.CLIPVisionModel, config)), TINY, "pixel_values", dynamic)


def siglip_vision(*, dynamic: bool = False) -> Example:
    """SigLIP's vision tower, whose head pools with one learned query."""
    config = transformers.SiglipVisionConfig(**_common())
    return images(random_model(partial(transformers.SiglipVisionModel, config)), TINY, "pixel_values", dynamic)


def swin(*, dynamic: bool = False, window: int = 7) -> Example:
    """Swin: attention in windows of 7 x 7 patches with a learned position bias; every other block shifts them."""
    config = transformers.SwinConfig(
        image_size=112, patch_size=4, embed_dim=64, depths=[2, 2], num_heads=[2, 4], window_size=window
    )
    size = replace(TINY, tokens=112)
    return images(random_model(partial(transformers.SwinModel, config)), size, "pixel_values", dynamic)


def whisper_encoder(*, dynamic: bool = False) -> Example:
    """Whisper's encoder: two convolutions over a spectrogram, then blocks whose k_proj has no bias."""
    config = transformers.WhisperConfig(
        d_model=TINY.hidden,
        encoder_layers=TINY.layers,
        encoder_attention_heads=TINY.heads,
        encoder_ffn_dim=TINY.ffn,
        num_mel_bins=80,
        max_source_positions=64,
    )
    model = random_model(partial(transformers.models.whisper.modeling_whisper.WhisperEncoder, config))
    features = torch.randn(2, 80, 128, generator=torch.Generator().manual_seed(1))
    example = Example(model, (), {"input_features": features}, [{"input_features": features}])
    if dynamic:
        shape = features.shape[1:]
        example.dynamic_shapes = {"input_features": {0: torch.export.Dim.DYNAMIC}}
        example.profiles = {"input_features": ((1, *shape), (2, *shape), (4, *shape))}
    return example


def _common() -> dict[str, Any]:
    return {
        "num_hidden_layers": TINY.layers,
        "hidden_size": TINY.hidden,
        "num_attention_heads": TINY.heads,
        "intermediate_size": TINY.ffn,
        "image_size": TINY.tokens,
        "patch_size": TINY.patch,
    }
