"""Example inputs for a Hugging Face model, made from its config: shapes to capture with, no data to calibrate on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qcompile.errors import SourceError
from qcompile.remedy import Remedy, with_remedy

_DEFAULT_TOKENS = 128
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
_AUDIO_SAMPLES = 16000


@dataclass(frozen=True)
class Sizes:
    """What is known of example inputs besides the config.

    Attributes:
        batch: their first axis.
        tokens: sequence length of text; None leaves it to what follows.
        shapes: input -> shape of calibration data; 128 tokens, and images as the config has them, where they have none.
    """

    batch: int = 1
    tokens: int | None = None
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)


def example_inputs(model: torch.nn.Module, name: str, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Keyword inputs of `model`, random with a fixed seed.

    Images are `pixel_values` [batch, channels, height, width]; text is `input_ids` [batch, tokens], with an
    `attention_mask` for encoders; audio is `input_features` or `input_values`. What else calibration data have of these
    is an input, too, such as an `attention_mask` of a decoder.

    Raises:
        SourceError: the model's inputs are not among those known here, or they have more tokens than it takes.
    """
    maker = _Maker(model, name, sizes)
    main = getattr(model, "main_input_name", None)
    if main not in _MAKERS:
        raise SourceError(f"{name}: no example inputs are known for it (its main input is {main}); use a factory")
    names = [main]
    if main == "input_ids" and not is_causal(maker.config):
        names.append("attention_mask")
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        names = ["input_ids", "pixel_values", "attention_mask"]  # CLIP and its kin compare a text with an image
    if getattr(model.config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    names += [name for name in sizes.shapes if name in _MAKERS and name not in names]
    taken = inspect.signature(model.forward).parameters
    return {name: _MAKERS[name](maker) for name in names if name in taken}


def is_causal(config: Any) -> bool:
    """Whether it is of a decoder-only language model, whose mask is a matter of position alone."""
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def token_limit(config: Any) -> int:
    """How many tokens the model has positions for; a number beyond all where it does not say."""
    for part in (config, getattr(config, "text_config", None)):
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(limit := getattr(part, key, None), int):
                return limit
    return 2**31


class _Maker:
    """Makes the inputs of one model; composite configs are looked through for the part that an input belongs to."""

    def __init__(self, model: torch.nn.Module, name: str, sizes: Sizes) -> None:
        self.model, self.name, self.batch, self.sizes = model, name, sizes.batch, sizes
        self.config: Any = model.config
        self.random = torch.Generator().manual_seed(0)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def look_up(self, keys: tuple[str, ...], parts: tuple[str, ...], default: Any = None) -> Any:
        """The first of `keys` that the config or one of its parts has."""
        for config in (self.config, *(getattr(self.config, part, None) for part in parts)):
            for key in keys:
                if config is not None and getattr(config, key, None) is not None:
                    return getattr(config, key)
        if default is None:
            raise SourceError(f"{self.name}: its config has no {keys[0]}, so its inputs are unknown; use a factory")
        return default

    def tokens(self, name: str) -> int:
        limit = token_limit(self.config)
        of_data = self.of_data(name, 2)
        tokens = self.sizes.tokens or (of_data[0] if of_data else min(_DEFAULT_TOKENS, limit))
        if tokens > limit:
            problem = SourceError(f"{self.name} takes at most {limit} tokens, not {tokens}")
            raise with_remedy(problem, Remedy({"--sequence": (str(limit),)}) if self.sizes.tokens else Remedy())
        return tokens

    def of_data(self, name: str, rank: int) -> Sequence[int]:
        """The sizes behind the first axis that calibration data have for an input; none if they have none for it."""
        shape = self.sizes.shapes.get(name, ())
        return shape[1:] if len(shape) == rank else ()

    def floats(self, *sizes: int) -> torch.Tensor:
        return torch.randn(self.batch, *sizes, generator=self.random).to(self.dtype)

    def pixel_values(self) -> torch.Tensor:
        if of_data := self.of_data("pixel_values", 4):
            return self.floats(*of_data)
        size = self.look_up(("image_size",), ("vision_config",))
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = self.look_up(("num_channels", "in_channels"), ("vision_config",), default=3)
        return self.floats(channels, height, width)

    def ids(self, name: str) -> torch.Tensor:
        vocabulary = self.look_up(("vocab_size",), ("text_config",))
        return torch.randint(0, vocabulary, (self.batch, self.tokens(name)), generator=self.random)

    def attention_mask(self) -> torch.Tensor:
        return torch.ones(self.batch, self.tokens("attention_mask"), dtype=torch.int64)

    def token_type_ids(self) -> torch.Tensor:
        return torch.zeros(self.batch, self.tokens("token_type_ids"), dtype=torch.int64)

    def input_features(self) -> torch.Tensor:
        if of_data := self.of_data("input_features", 3):
            return self.floats(*of_data)
        # Whisper's encoder halves the frames and has one position for each that is left.
        return self.floats(self.look_up(("num_mel_bins",), ()), 2 * self.look_up(("max_source_positions",), ()))

    def input_values(self) -> torch.Tensor:
        return self.floats(*(self.of_data("input_values", 2) or (_AUDIO_SAMPLES,)))


_MAKERS: dict[str, Callable[[_Maker], torch.Tensor]] = {
    "pixel_values": _Maker.pixel_values,
    "input_ids": lambda maker: maker.ids("input_ids"),
    "attention_mask": _Maker.attention_mask,
    "token_type_ids": _Maker.token_type_ids,
    "decoder_input_ids": lambda maker: maker.ids("decoder_input_ids"),
    "input_features": _Maker.input_features,
    "input_values": _Maker.input_values,
}
