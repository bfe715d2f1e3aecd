"""Small networks of diffusers for the sweep: UNets, autoencoders and transformers for images, video and sound."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers
import torch

from benchmarks.models import Example, random_model

TEXT, WIDTH = 32, 64  # text tokens and the width of what encodes them


def _made(name: str, options: Mapping[str, Any], kwargs: Callable[[], dict[str, Any]]) -> Example:
    model = random_model(partial(getattr(diffusers, name), **options))
    batch = kwargs()
    if "return_dict" in inspect.signature(model.forward).parameters:
        batch["return_dict"] = False
    return Example(model, (), batch, [batch])


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _conditioned(*image: int, **more: Any) -> dict[str, Any]:
    text = _noise(1, TEXT, WIDTH)
    return {"hidden_states": _noise(1, *image), "encoder_hidden_states": text, "timestep": torch.tensor([17]), **more}


def _unet(**more: Any) -> dict[str, Any]:
    return {"sample": _noise(1, 4, 16, 16), "timestep": torch.tensor(17), **more}


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1}
_BLOCKS: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_UNET = {**_BLOCKS, "sample_size": 16, "cross_attention_dim": WIDTH, "attention_head_dim": 2}
_DOWN, _UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
_CODEC: dict[str, Any] = {
    **_BLOCKS,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
}


def _sdxl() -> dict[str, Any]:
    added = {"text_embeds": _noise(1, WIDTH), "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]]).float()}
    return _unet(encoder_hidden_states=_noise(1, TEXT, WIDTH), added_cond_kwargs=added)


_SPECS: dict[str, tuple[str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "unet-sd": (
        "UNet2DConditionModel",
        {**_UNET, "down_block_types": _DOWN, "up_block_types": _UP},
        lambda: _unet(encoder_hidden_states=_noise(1, TEXT, WIDTH)),
    ),
    "unet-sdxl": (
        "UNet2DConditionModel",
        {
            **_UNET,
            "down_block_types": _DOWN,
            "up_block_types": _UP,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 * 6 + WIDTH,
        },
        _sdxl,
    ),
    "unet-unconditional": (
        "UNet2DModel",
        {
            **_BLOCKS,
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 32,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        _unet,
    ),
    "autoencoder-kl": ("AutoencoderKL", {**_CODEC}, lambda: {"sample": _noise(1, 3, 32, 32)}),
    "vq": ("VQModel", {**_CODEC, "num_vq_embeddings": 32}, lambda: {"sample": _noise(1, 3, 32, 32)}),
    "autoencoder-tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (32, 32),
            "decoder_block_out_channels": (32, 32),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        lambda: {"sample": _noise(1, 3, 32, 32)},
    ),
    "dit": (
        "DiTTransformer2DModel",
        {**_HEADS, "in_channels": 4, "out_channels": 8, "sample_size": 16, "num_embeds_ada_norm": 1000},
        lambda: {
            "hidden_states": _noise(1, 4, 16, 16),
            "timestep": torch.tensor([17]),
            "class_labels": torch.tensor([3]),
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {**_HEADS, "sample_size": 16, "cross_attention_dim": 64, "caption_channels": WIDTH},
        lambda: _conditioned(4, 16, 16, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 64,
            "caption_channels": WIDTH,
            "sample_size": 16,
        },
        lambda: _conditioned(4, 16, 16),
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": WIDTH,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "max_text_seq_length": TEXT,
        },
        lambda: _conditioned(3, 4, 8, 8),
    ),
    "aura-flow": (
        "AuraFlowTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "sample_size": 16,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": WIDTH,
            "caption_projection_dim": 64,
            "pos_embed_max_size": 256,
        },
        lambda: _conditioned(4, 16, 16),
    ),
    "latte": (
        "LatteTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 64,
            "caption_channels": WIDTH,
            "video_length": 4,
            "norm_type": "ada_norm_single",
            "num_embeds_ada_norm": 1000,
            "attention_bias": True,
        },
        lambda: _conditioned(4, 4, 8, 8, enable_temporal_attentions=True),
    ),
    "ltx-video": (
        "LTXVideoTransformer3DModel",
        {**_HEADS, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 64, "caption_channels": WIDTH},
        lambda: _conditioned(2 * 4 * 8, 8, encoder_attention_mask=torch.ones(1, TEXT), num_frames=2, height=4, width=8),
    ),
    "wan": (
        "WanTransformer3DModel",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "ffn_dim": 128, "freq_dim": 64},
        lambda: _conditioned(4, 2, 16, 16),
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "num_layers": 2,
            "in_channels": 4,
            "text_embed_dim": WIDTH,
            "pooled_projection_dim": 32,
            "time_embed_dim": 8,
        },
        lambda: _conditioned(4, 2, 16, 16, encoder_attention_mask=torch.ones(1, TEXT).bool()),
    ),
    "hunyuan-dit": (
        "HunyuanDiT2DModel",
        {
            **_HEADS,
            "num_layers": 2,
            "sample_size": 16,
            "hidden_size": 64,
            "patch_size": 2,
            "in_channels": 4,
            "mlp_ratio": 2.0,
            "cross_attention_dim": WIDTH,
            "cross_attention_dim_t5": WIDTH,
            "pooled_projection_dim": 16,
            "text_len": TEXT,
            "text_len_t5": TEXT,
        },
        lambda: _conditioned(
            4,
            16,
            16,
            timestep=torch.tensor([17.0]),
            text_embedding_mask=torch.ones(1, TEXT),
            encoder_hidden_states_t5=_noise(1, TEXT, WIDTH),
            text_embedding_mask_t5=torch.ones(1, TEXT),
            image_meta_size=torch.tensor([[64, 64, 64, 64, 0, 0]]).float(),
            style=torch.tensor([0]),
            image_rotary_emb=[_noise(64, 32), _noise(64, 32)],
        ),
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": WIDTH,
            "axes_dims_rope": (8, 12, 12),
        },
        lambda: _conditioned(64, 16, encoder_hidden_states_mask=torch.ones(1, TEXT), img_shapes=[(1, 8, 8)]),
    ),
    "stable-audio": (
        "StableAudioDiTModel",
        {
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 64,
            "cross_attention_input_dim": WIDTH,
            "global_states_input_dim": 64,
            "time_proj_dim": 64,
        },
        lambda: _conditioned(
            4,
            64,
            timestep=torch.tensor([0.4]),
            global_hidden_states=_noise(1, 1, 64),
            rotary_embedding=(_noise(65, 16), _noise(65, 16)),
        ),
    ),
    "uvit": (
        "UVit2DModel",
        {
            "hidden_size": 64,
            "cond_embed_dim": 32,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": WIDTH,
            "vocab_size": 64,
            "codebook_size": 60,
            "in_channels": 32,
            "block_out_channels": 32,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 128,
        },
        lambda: {
            "input_ids": torch.randint(0, 60, (1, 8, 8), generator=torch.Generator().manual_seed(1)),
            "encoder_hidden_states": _noise(1, TEXT, WIDTH),
            "pooled_text_emb": _noise(1, 32),
            "micro_conds": torch.tensor([[64, 64, 0, 0, 6.0]]),
        },
    ),
}
MODELS: Mapping[str, Callable[[], Example]] = {name: partial(_made, *spec) for name, spec in _SPECS.items()}

_WIDE: dict[str, Any] = {"block_out_channels": (128, 256), "norm_num_groups": 32}
_WIDE_UNET = {**_UNET, **_WIDE, "sample_size": 32, "cross_attention_dim": 256, "attention_head_dim": 4}


def _wide_inputs() -> dict[str, Any]:
    inputs = {"sample": _noise(1, 4, 32, 32), "timestep": torch.tensor(17)}
    return {**inputs, "encoder_hidden_states": _noise(1, TEXT, 256)}


WIDE: Mapping[str, Callable[[], Example]] = {
    "unet": partial(
        _made, "UNet2DConditionModel", {**_WIDE_UNET, "down_block_types": _DOWN, "up_block_types": _UP}, _wide_inputs
    ),
    "autoencoder": partial(_made, "AutoencoderKL", {**_CODEC, **_WIDE}, lambda: {"sample": _noise(1, 3, 64, 64)}),
}
"""Of widths at which convolutions are bound by arithmetic."""
