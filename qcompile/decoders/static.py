"""A decoder whose keys and values are written into buffers of a fixed length, which it takes and gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from qcompile.decoders.prepare import BATCH, Decoder
from qcompile.decoders.wrapper import Layers, WithCache
from qcompile.errors import CalibrationError, CaptureError


class WithStaticCache(WithCache):
    """`model` with buffers of keys and values among its inputs and outputs."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        cache_position: Tensor,
        past_key_values: Layers,
    ) -> dict[str, Any]:
        """Logits and the buffers with what is new in them.

        Args:
            input_ids: `[batch, sequence]`, the new tokens.
            attention_mask: `[batch, length]`, 0 where a token is padding. What lies behind a token is hidden from it
                whatever the mask says of it.
            position_ids: `[batch, sequence]`, positions of the new tokens.
            cache_position: `[1]`, where the first of them is written; the others follow it. One number and no list of
                positions, as that is what operators that write in place take (TensorScatter, KVCacheUpdate).
            past_key_values: keys and values `[batch, heads, length, width]` of each layer.
        """
        written = torch.arange(input_ids.shape[1], device=input_ids.device) + cache_position
        return self.run(input_ids, attention_mask, position_ids, _cache(past_key_values, cache_position, written))


def _cache(layers: Layers, start: Tensor, positions: Tensor) -> Any:
    """A cache of transformers that writes `layers` at `positions`, the first of which is `start`."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Written(DynamicLayer):  # type: ignore[no-untyped-call]
        """One layer. It is none of transformers' static ones, which count their tokens themselves and write in place;
        a sliding window is a matter of the mask."""

        keys: Tensor
        values: Tensor

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.keys = self.keys.index_copy(2, positions, key_states)
            self.values = self.values.index_copy(2, positions, value_states)
            return self.keys, self.values

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.keys.shape[2], 0

        def get_seq_length(self) -> Any:
            return start

    cache = DynamicCache()
    for given in layers:
        layer = Written()  # type: ignore[no-untyped-call]
        layer.lazy_initialization(given["key"], given["value"])
        layer.keys, layer.values = given["key"], given["value"]
        cache.layers.append(layer)
    return cache


@dataclass(frozen=True)
class StaticDecoder(Decoder):
    """A decoder with buffers of `length` tokens."""

    length: int = 0

    def inputs(
        self, batch: Mapping[str, Any], past: list[dict[str, Tensor]] | None = None, before: int = 0
    ) -> dict[str, Any]:
        """As of any decoder: the mask of the batch is that of its `before` tokens and the new ones."""
        ids = batch["input_ids"]
        rows, new = ids.shape
        if before + new > self.length:
            raise CalibrationError(
                f"{before + new} tokens are more than the cache has room for, {self.length}: give shorter batches, or"
                f" Cache('static', length={before + new})"
            )
        given = past if past is not None else [layer.empty(rows, self.length) for layer in self.layers]
        found = super().inputs(batch, given, before)
        mask = found["attention_mask"]
        unwritten = mask.new_zeros((rows, self.length - mask.shape[1]))
        past_key_values = found.pop("past_key_values")
        found["attention_mask"] = torch.cat([mask, unwritten], 1)
        return {
            **found,
            "cache_position": torch.tensor([before], device=ids.device),
            "past_key_values": past_key_values,
        }


def check_length(length: int, config: Any, name: str) -> None:
    """Raises CaptureError for more tokens than the model has positions."""
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise CaptureError(f"a cache of {length} tokens is longer than the {most} positions of {name}")


def static_shapes(layers: int, length: int) -> dict[str, Any]:
    """What is dynamic: rows and new tokens."""
    batch, sequence = Dim("batch", min=1), Dim("sequence", min=1, max=length)
    rows = {0: batch}
    return {
        "input_ids": {0: batch, 1: sequence},
        "attention_mask": rows,
        "position_ids": {0: batch, 1: sequence},
        "cache_position": None,
        "past_key_values": [{"key": rows, "value": rows} for _ in range(layers)],
    }


def static_decoder(model: Any, layers: list[Any], length: int, *, last: bool) -> StaticDecoder:
    """`model` with buffers of `length` tokens for its `layers`.

    Raises:
        CaptureError: it has fewer positions.
    """
    check_length(length, model.config, type(model).__name__)
    decoder = StaticDecoder(
        WithStaticCache(model, last=last), layers, {}, static_shapes(len(layers), length), length=length
    )
    ids = torch.zeros((BATCH, min(length, 6)), dtype=torch.int64, device=model.device)
    decoder.kwargs.update(decoder.inputs({"input_ids": ids}))
    return decoder
