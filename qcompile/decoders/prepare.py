"""From a model of transformers and what it is calibrated with to what is captured: module, inputs, sizes, batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from qcompile.capture.batches import PlacedBatches
from qcompile.decoders.layout import LayerCache, is_decoder, layout_of
from qcompile.decoders.wrapper import WithCache
from qcompile.errors import CalibrationError, CaptureError

BATCH, _SEQUENCE, _PAST = 2, 6, 8  # of the example: sizes that torch.export takes for no special ones


@dataclass(frozen=True)
class Decoder:
    """A decoder with its cache, ready to be captured.

    Attributes:
        module: takes and gives the cache. layers: what that is. kwargs: example inputs. dynamic_shapes: of these.
    """

    module: WithCache
    layers: list[LayerCache]
    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, Any]

    def inputs(
        self, batch: Mapping[str, Any], past: list[dict[str, torch.Tensor]] | None = None, before: int = 0
    ) -> dict[str, Any]:
        """What the module takes for `input_ids` and, where there is one, `attention_mask` over past and new tokens;
        `past` holds `before` tokens."""
        ids = batch["input_ids"]
        rows, new = ids.shape
        given = past if past is not None else [layer.empty(rows, before) for layer in self.layers]
        mask = batch.get("attention_mask")
        mask = torch.ones((rows, before + new), dtype=torch.int64, device=ids.device) if mask is None else mask
        positions = batch.get("position_ids")
        if positions is None:
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, before:]
        mask = mask.to(torch.int64)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": given}

    def batches(self, calibration: Any) -> Any:
        """`calibration` as batches of the module, each in halves: one without a past, and one behind it. What is no
        batches, a state or nothing, stays what it is."""
        states = isinstance(calibration, Mapping) and all(isinstance(v, torch.Tensor) for v in calibration.values())
        if calibration is None or (states and "input_ids" not in [*calibration]):
            return calibration
        return CachedBatches(self, [calibration] if isinstance(calibration, Mapping) else calibration)


class CachedBatches(Iterable[Any]):
    """Token batches as prefill and decode of a decoder."""

    def __init__(self, decoder: Decoder, batches: Iterable[Any]) -> None:
        self.decoder, self.given = decoder, batches
        self.notices: Sequence[str] = batches.notices if isinstance(batches, PlacedBatches) else ()

    def __len__(self) -> int:
        if not isinstance(self.given, Sized):
            raise TypeError("the number of batches is not known")
        return 2 * len(self.given)

    def place(self, index: int) -> str:
        """Where a batch comes from."""
        return self.given.place(index // 2) if isinstance(self.given, PlacedBatches) else f"batch {index // 2}"

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, batch in enumerate(self.given):
            tokens = _tokens(batch, index)
            half = (tokens["input_ids"].shape[1] + 1) // 2
            prompt = self.decoder.inputs(_part(tokens, slice(0, half)))
            yield prompt
            if half < tokens["input_ids"].shape[1]:
                rest = _part(tokens, slice(half, None))
                past = self.decoder.module.evaluated(**prompt)["present"]
                rest["attention_mask"] = tokens.get("attention_mask")
                yield self.decoder.inputs(rest, past, half)


def _part(batch: Mapping[str, Any], part: slice) -> dict[str, Any]:
    return {name: None if value is None else value[:, part] for name, value in batch.items()}


def _tokens(batch: Any, index: int) -> dict[str, Any]:
    """`input_ids`, `attention_mask` and `position_ids` of a batch as users have them."""
    found = dict(batch) if isinstance(batch, Mapping) else {"input_ids": batch}
    if isinstance(batch, (tuple, list)):
        found = dict(zip(("input_ids", "attention_mask"), batch, strict=False))
    ids = found.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
        raise CalibrationError(f"batch {index}: a decoder is calibrated with input_ids [batch, tokens]")
    return {name: found[name] for name in ("input_ids", "attention_mask", "position_ids") if name in found}


def layers_of(model: Any) -> list[LayerCache]:
    """What `model` keeps.

    Raises:
        CaptureError: it is no decoder of transformers, or keeps another state than keys and values.
    """
    if isinstance(model, ExportedProgram) or not is_decoder(model):
        raise CaptureError(
            f"cache= is for models of transformers that generate, not for {type(model).__name__}: give a module that"
            " takes keys and values and returns them, and it is captured as it is"
        )
    return layout_of(model)


def dynamic_decoder(model: Any, layers: list[LayerCache], *, last: bool) -> Decoder:
    """`model` with caches that grow."""
    ids = torch.zeros((BATCH, _SEQUENCE), dtype=torch.int64, device=model.device)
    past = [layer.empty(BATCH, _PAST) for layer in layers]
    decoder = Decoder(WithCache(model, last=last), layers, {}, _dynamic_shapes(len(layers)))
    decoder.kwargs.update(decoder.inputs({"input_ids": ids}, past, _PAST))
    return decoder


def _dynamic_shapes(layers: int) -> dict[str, Any]:
    batch, sequence = Dim("batch", min=1), Dim("sequence", min=1)
    past, total = Dim("past", min=0), Dim("total", min=1)
    new = {0: batch, 1: sequence}
    kept = {0: batch, 2: past}
    return {
        "input_ids": new,
        "attention_mask": {0: batch, 1: total},
        "position_ids": new,
        "past_key_values": [{"key": kept, "value": kept} for _ in range(layers)],
    }
