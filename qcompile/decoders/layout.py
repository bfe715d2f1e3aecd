"""What the cache of a model looks like, found by running it on one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qcompile.errors import CaptureError
from qcompile.messages import first_line


@dataclass(frozen=True)
class LayerCache:
    """The cache of one layer: keys `[batch, heads, tokens, key_width]`, values with a width of their own."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device

    def empty(self, batch: int, tokens: int) -> dict[str, torch.Tensor]:
        """Zeros of this layout."""
        widths = {"key": self.key_width, "value": self.value_width}
        sizes = {name: (batch, self.heads, tokens, width) for name, width in widths.items()}
        return {name: torch.zeros(size, dtype=self.dtype, device=self.device) for name, size in sizes.items()}


def is_decoder(model: object) -> bool:
    """Whether `model` is one of transformers that generates text, decoder only."""
    config = getattr(model, "config", None)
    generates = callable(getattr(model, "prepare_inputs_for_generation", None))
    return config is not None and generates and not getattr(config, "is_encoder_decoder", False)


def layout_of(model: Any) -> list[LayerCache]:
    """The caches of the layers of `model`, in their order.

    Raises:
        CaptureError: the model has another kind of state, in place of keys and values or beside them.
    """
    from transformers import DynamicCache

    name, cache = type(model).__name__, DynamicCache()
    ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            given = model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:  # whatever a model raises that has no such cache
        raise CaptureError(f"{name} does not run with a key/value cache: {first_line(error)}") from error
    cache = given.past_key_values
    layers = getattr(cache, "layers", None)
    if not layers:
        raise CaptureError(f"{name} gives back {type(cache).__name__}, which has no layers of keys and values")
    return [_layer(layer, index, name) for index, layer in enumerate(layers)]


def _layer(layer: Any, index: int, name: str) -> LayerCache:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.ndim == values.ndim == 4:
        return LayerCache(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
    raise CaptureError(
        f"layer {index} of {name} keeps {type(layer).__name__}, which is not keys and values [batch, heads, tokens,"
        " width]: capture it without a cache"
    )
