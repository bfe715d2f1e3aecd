"""Tiny diffusion transformers for the coverage table: Flux, Flux.2 and Stable Diffusion 3, as diffusers writes them.

All attend over text and image tokens together. Double-stream blocks have linear layers of their own for text and image;
single-stream blocks have one set for the joint sequence. Random weights.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.models import Example, random_model

HEADS, WIDTH = 2, 64
TEXT, SIDE = 32, 8  # text tokens; the image has SIDE^2 of them
TEXT_WIDTH, POOLED = 96, 48
GUIDANCE = 3.5


def flux(*, dynamic: bool = False) -> Example:
    """Flux: one double-stream and two single-stream blocks; RMS norm on q and k, rotary embedding from float ids."""
    make = partial(
        diffusers.FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    return _flux(random_model(make), axes=3, pooled=True, dynamic=dynamic)


def flux2(*, dynamic: bool = False) -> Example:
    """Flux.2: SwiGLU, one modulation for all blocks, and single-stream blocks with one linear for QKV and MLP."""
    make = partial(
        diffusers.Flux2Transformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=64,
        axes_dims_rope=(16, 16, 16, 16),
    )
    return _flux(random_model(make), axes=4, pooled=False, dynamic=dynamic)


def sd3(*, dynamic: bool = False) -> Example:
    """Stable Diffusion 3: two double-stream blocks, the last without a text output; no norm on q and k."""
    return _sd3(dynamic, dual_attention_layers=(), qk_norm=None)


def sd35(*, dynamic: bool = False) -> Example:
    """Stable Diffusion 3.5: RMS norm on q and k, and in the first block a second attention over the image alone."""
    return _sd3(dynamic, dual_attention_layers=(0,), qk_norm="rms_norm")


def _sd3(dynamic: bool, **options: Any) -> Example:
    make = partial(
        diffusers.SD3Transformer2DModel,
        sample_size=2 * SIDE,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=HEADS * WIDTH,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=2 * SIDE,
        **options,
    )
    batch = {
        "hidden_states": _noise(2, 4, 2 * SIDE, 2 * SIDE),
        "encoder_hidden_states": _noise(2, TEXT, TEXT_WIDTH),
        "pooled_projections": _noise(2, POOLED),
        "timestep": torch.tensor([981.0, 17.0]),
    }
    example = Example(random_model(make), (), batch, [batch])
    return _dynamic(example, {"encoder_hidden_states": TEXT}) if dynamic else example


def _flux(model: torch.nn.Module, *, axes: int, pooled: bool, dynamic: bool) -> Example:
    """Inputs as the pipelines of Flux make them: ids are (time, row, column[, text position]) as float numbers."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    image_ids, text_ids = torch.zeros(SIDE**2, axes), torch.zeros(TEXT, axes)
    image_ids[:, 1], image_ids[:, 2] = rows.flatten(), columns.flatten()
    if axes == 4:
        text_ids[:, 3] = torch.arange(TEXT)
    batch = {
        "hidden_states": _noise(2, SIDE**2, 16),
        "encoder_hidden_states": _noise(2, TEXT, TEXT_WIDTH),
        **({"pooled_projections": _noise(2, POOLED)} if pooled else {}),
        "timestep": torch.tensor([0.981, 0.017]),
        "img_ids": image_ids,
        "txt_ids": text_ids,
        "guidance": torch.full((2,), GUIDANCE),
    }
    example = Example(model, (), batch, [batch])
    return _dynamic(example, {"hidden_states": SIDE**2, "encoder_hidden_states": TEXT}) if dynamic else example


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def _dynamic(example: Example, lengths: dict[str, int]) -> Example:
    """`example` with a free batch and, for the inputs that `lengths` names, a free sequence of that length at most."""
    free = torch.export.Dim.DYNAMIC
    of_ids = {"img_ids": "hidden_states", "txt_ids": "encoder_hidden_states"}
    dynamic: dict[str, Any] = {}
    profiles: dict[str, Any] = {}
    for name, value in example.kwargs.items():
        axes = ({1} if name in lengths else set()) | {0}
        length = lengths.get(of_ids.get(name, name))
        dynamic[name] = dict.fromkeys(axes, free)
        profiles[name] = tuple(
            tuple(_size(name, axis, size, batch, length) for axis, size in enumerate(value.shape))
            for batch in (1, 2, 4)
        )
    return replace(example, dynamic_shapes=dynamic, profiles=profiles)


def _size(name: str, axis: int, size: int, batch: int, length: int | None) -> int:
    """Size of an axis in the profile for a batch of `batch`: the smallest one has half the tokens."""
    is_length = axis == (0 if name.endswith("_ids") else 1)
    if length is not None and is_length:
        return length // 2 if batch == 1 else length
    return size if axis or name.endswith("_ids") else batch
