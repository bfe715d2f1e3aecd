"""Example inputs for a Hugging Face model, made from its config: shapes to capture with, no data to calibrate on."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from qcompile.errors import SourceError

_DEFAULT_TOKENS = 128
_AUDIO_SAMPLES = 16000


def example_inputs(model: torch.nn.Module, name: str, batch: int, tokens: int | None) -> dict[str, torch.Tensor]:
    """Keyword inputs of `model`, random with a fixed seed.

    Images are `pixel_values` [batch, channels, height, width]; text is `input_ids` [batch, tokens], with an
    `attention_mask` for encoders; audio is `input_features` or `input_values`.

    Args:
        tokens: sequence length of text; None is 128, or the longest that the model takes if that is less.

    Raises:
        SourceError: the model's inputs are not among those known here, or `tokens` is more than it takes.
    """
    maker = _Maker(model, name, batch, tokens)
    main = getattr(model, "main_input_name", None)
    if main not in _MAKERS:
        raise SourceError(f"{name}: no example inputs are known for it (its main input is {main}); use a factory")
    names = [main]
    if main == "input_ids" and not maker.is_causal:
        names.append("attention_mask")
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        names = ["input_ids", "pixel_values", "attention_mask"]  # CLIP and its kin compare a text with an image
    if getattr(model.config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    taken = inspect.signature(model.forward).parameters
    return {name: _MAKERS[name](maker) for name in names if name in taken}


class _Maker:
    """Makes the inputs of one model; composite configs are looked through for the part that an input belongs to."""

    def __init__(self, model: torch.nn.Module, name: str, batch: int, tokens: int | None) -> None:
        self.model, self.name, self.batch = model, name, batch
        self.config: Any = model.config
        self.random = torch.Generator().manual_seed(0)
        self._tokens = tokens
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def is_causal(self) -> bool:
        """A decoder-only language model, whose mask is a matter of position alone."""
        from transformers.models.auto import modeling_auto as auto

        kind = self.config.model_type
        return kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES

    def look_up(self, keys: tuple[str, ...], parts: tuple[str, ...], default: Any = None) -> Any:
        """The first of `keys` that the config or one of its parts has."""
        for config in (self.config, *(getattr(self.config, part, None) for part in parts)):
            for key in keys:
                if config is not None and getattr(config, key, None) is not None:
                    return getattr(config, key)
        if default is None:
            raise SourceError(f"{self.name}: its config has no {keys[0]}, so its inputs are unknown; use a factory")
        return default

    def tokens(self) -> int:
        limit = self.look_up(("max_position_embeddings", "n_positions"), ("text_config",), default=2**31)
        if self._tokens is not None and self._tokens > limit:
            raise SourceError(f"{self.name} takes at most {limit} tokens, not {self._tokens}")
        return self._tokens or min(_DEFAULT_TOKENS, limit)

    def floats(self, *sizes: int) -> torch.Tensor:
        return torch.randn(self.batch, *sizes, generator=self.random).to(self.dtype)

    def pixel_values(self) -> torch.Tensor:
        size = self.look_up(("image_size",), ("vision_config",))
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = self.look_up(("num_channels", "in_channels"), ("vision_config",), default=3)
        return self.floats(channels, height, width)

    def input_ids(self) -> torch.Tensor:
        vocabulary = self.look_up(("vocab_size",), ("text_config",))
        return torch.randint(0, vocabulary, (self.batch, self.tokens()), generator=self.random)

    def attention_mask(self) -> torch.Tensor:
        return torch.ones(self.batch, self.tokens(), dtype=torch.int64)

    def input_features(self) -> torch.Tensor:
        # Whisper's encoder halves the frames and has one position for each that is left.
        return self.floats(self.look_up(("num_mel_bins",), ()), 2 * self.look_up(("max_source_positions",), ()))

    def input_values(self) -> torch.Tensor:
        return self.floats(_AUDIO_SAMPLES)


_MAKERS = {
    "pixel_values": _Maker.pixel_values,
    "input_ids": _Maker.input_ids,
    "attention_mask": _Maker.attention_mask,
    "decoder_input_ids": _Maker.input_ids,
    "input_features": _Maker.input_features,
    "input_values": _Maker.input_values,
}
