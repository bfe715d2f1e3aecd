"""The architectures of the sweep: small forms of what transformers, timm, torchvision and diffusers have.

`architectures.txt` has a line for each: to add one, write its name there, and if it is of diffusers, a row in
`diffusion_zoo`. A model of transformers is made by its configuration class with few, narrow layers. All weights are
random. timm and torchvision are optional: without them their rows are left out.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import diffusion_zoo
from benchmarks.models import Example, random_model

TOKENS, PIXELS, VOCABULARY = 64, 64, 512
_HAS_IMAGES = bool(importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision"))
if _HAS_IMAGES and not hasattr(torch.ops.torchvision, "nms"):
    # torchvision's CUDA build loads no kernels beside a CPU build of torch; its import, which transformers tries, too,
    # then fails for want of the names of two
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

NARROW: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size", "hidden_dim"), 64),
    **dict.fromkeys(("model_dim", "encoder_hidden_size", "projection_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("decoder_num_key_value_heads", "type_vocab_size", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_dim", "d_head"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "depth", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner", "mlp_dim"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "vocab_size": VOCABULARY,
    "image_size": PIXELS,
    "patch_size": 8,
}
"""What configurations call their sizes -> what they are here."""


@dataclass(frozen=True)
class Architecture:
    """One row of the sweep: `library/name`, and how it is made."""

    name: str
    example: Callable[[], Example]


def of_transformers(model_type: str) -> Example:
    """The bare model of a type of transformers, narrow, with the inputs that its `forward` asks for."""
    config = narrow(transformers.CONFIG_MAPPING[model_type]())
    if hasattr(config, "use_cache"):
        config.use_cache = False  # the plain export of the comparison needs it off
    torch.use_deterministic_algorithms(True, warn_only=True)  # what `torch.empty` gives is then NaN
    try:
        model = random_model(partial(transformers.AutoModel.from_config, config))
    finally:
        torch.use_deterministic_algorithms(False)
    for parameter in model.parameters():
        # some no initialization fills, and a router that starts at zero chooses by how ties are broken
        if parameter.isnan().any() or (parameter.ndim > 1 and not parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(2))
    batch = inputs(model, config)
    return Example(model, (), batch, [batch])


def narrow(config: Any) -> Any:
    """`config` and those inside of it with the sizes of `NARROW`."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            narrow(value)
        elif name == "head_dim" and hasattr(config, "qk_rope_head_dim"):
            continue  # of latent attention: two parts, each with a size of its own
        elif name in NARROW and type(value) is int:
            setattr(config, name, NARROW[name])
        elif name.endswith("_token_id") and type(value) is int and value >= VOCABULARY:
            setattr(config, name, 1)
        elif name == "layer_types" and isinstance(value, list):
            config.layer_types = value[-NARROW["num_hidden_layers"] :]
    return config


def inputs(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """Random text, images and sound, as far as `model` takes them."""
    text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", config)
    generator = torch.Generator().manual_seed(1)
    ids = partial(torch.randint, 5, min(500, getattr(text, "vocab_size", 500)), (1, TOKENS), generator=generator)
    size = getattr(vision, "image_size", PIXELS)
    height, width = (size, size) if isinstance(size, int) else size
    channels, mels = getattr(vision, "num_channels", 3), getattr(config, "num_mel_bins", 80)
    frames = 2 * getattr(config, "max_source_positions", TOKENS)
    noise = partial(torch.randn, generator=generator)
    known: dict[str, Callable[[], torch.Tensor]] = {
        "input_ids": ids,
        "pixel_values": lambda: noise(1, channels, height, width),
        "input_values": lambda: noise(1, 4000),
        "input_features": lambda: noise(1, mels, frames),
        "decoder_input_ids": ids,
    }
    taken = inspect.signature(model.forward).parameters
    return {name: make() for name, make in known.items() if name in taken}


def of_timm(name: str) -> Example:
    """A classifier of timm with images of its own size."""
    import timm

    model = random_model(partial(timm.create_model, name, num_classes=16))
    return _images(model, *model.pretrained_cfg["input_size"])


def of_torchvision(name: str) -> Example:
    """A model of torchvision on images of 224 pixels, or clips of eight frames of 112, or what it takes at least."""
    import torchvision

    make = torchvision.models.get_model_builder(name)
    parts = {"weights", "weights_backbone"}.intersection(inspect.signature(inspect.unwrap(make)).parameters)
    model = random_model(partial(make, **dict.fromkeys(parts)))
    if not type(model).__module__.startswith("torchvision.models.video"):
        return _images(model, 3, 224, 224)
    return _images(model, 3, 16, 224, 224) if name.startswith(("mvit", "s3d")) else _images(model, 3, 8, 112, 112)


def _images(model: torch.nn.Module, *shape: int) -> Example:
    images = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    return Example(model, (images,), {}, [images])


def _all() -> tuple[Architecture, ...]:
    makers = {"transformers": of_transformers, "timm": of_timm, "torchvision": of_torchvision}
    rows = [Architecture(f"diffusers/{name}", make) for name, make in diffusion_zoo.MODELS.items()]
    for name in (Path(__file__).with_suffix(".txt")).read_text().split():
        library, _, model = name.partition("/")
        if library == "transformers" or _HAS_IMAGES:
            rows.append(Architecture(name, partial(makers[library], model)))
    return tuple(rows)


ARCHITECTURES = _all()
