"""Models of an encoder and a decoder that generates, as two programs.

    encoder: inputs -> keys and values of every layer's attention to the encoder: present.N.encoder.key / .value
    decoder: new tokens, these, and its own cache past_key_values.N.decoder.key / .value -> logits, present.N.decoder...

What the decoder reads of the encoder is computed once, and no projection of it is left in the decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from passes.graph import ancestors
from qcompile.capture import capture
from qcompile.decoders.options import Cache
from qcompile.decoders.wrapper import Around
from qcompile.errors import CalibrationError, CaptureError
from qcompile.messages import first_line

_MASK = "attention_mask"
_PAST, _NEW = 5, 3  # tokens of the example


def is_encoder_decoder(model: object) -> bool:
    """Whether `model` is one of transformers that generates text from what it encodes."""
    generates = callable(getattr(model, "prepare_inputs_for_generation", None))
    return generates and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


class EncoderPart(Around):
    """Inputs of the encoder -> what the layers of the decoder read of it."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        input_values: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> dict[str, Any]:
        """Keys and values `[batch, heads, encoded, width]` of each layer."""
        named = {"input_ids": input_ids, "input_features": input_features, "input_values": input_values}
        named |= {"pixel_values": pixel_values, _MASK: attention_mask}
        inputs = {name: value for name, value in named.items() if value is not None}
        caches, first = _caches(), next(iter(inputs.values()))
        ids = torch.zeros((first.shape[0], 1), dtype=torch.int64, device=first.device)
        self._call[0](**inputs, decoder_input_ids=ids, past_key_values=caches, use_cache=True)
        layers = caches.cross_attention_cache.layers
        return {"present": [{"encoder": {"key": layer.keys, "value": layer.values}} for layer in layers]}


class DecoderPart(Around):
    """New tokens, the cache and what was encoded -> logits and the longer cache.

    Args:
        last: give the logits of the last position only.
    """

    def __init__(self, model: Any, *, last: bool = False) -> None:
        super().__init__(model)
        self.last = last

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: list[dict[str, dict[str, Tensor]]],
        encoder_attention_mask: Tensor | None = None,
    ) -> dict[str, Any]:
        """Logits `[batch, sequence, vocabulary]`, keys and values `[batch, heads, past + sequence, width]`.

        Args:
            input_ids: `[batch, sequence]`. encoder_attention_mask: `[batch, encoded]`.
            past_key_values: `decoder` and `encoder` of each layer.
        """
        from transformers.modeling_outputs import BaseModelOutput

        caches = _caches(past_key_values)
        key = past_key_values[0]["encoder"]["key"]
        hidden = key.new_zeros((key.shape[0], key.shape[2], self.config.hidden_size))  # nothing but its size is read
        mask = {} if encoder_attention_mask is None else {_MASK: encoder_attention_mask}
        given = self._call[0](
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            decoder_input_ids=input_ids,
            past_key_values=caches,
            use_cache=True,
            **mask,
        )
        logits = given.logits[:, -1:] if self.last else given.logits
        layers = caches.self_attention_cache.layers
        return {"logits": logits, "present": [{"decoder": {"key": x.keys, "value": x.values}} for x in layers]}


def _caches(past: list[dict[str, dict[str, Tensor]]] | None = None) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    own, encoded = DynamicCache(), DynamicCache()
    for index, layer in enumerate(past or ()):
        own.update(layer["decoder"]["key"], layer["decoder"]["value"], index)
        encoded.update(layer["encoder"]["key"], layer["encoder"]["value"], index)
    return EncoderDecoderCache(own, encoded)


@dataclass(frozen=True)
class Parts:
    """Both parts of a model, and the example inputs of its encoder."""

    encoder: EncoderPart
    decoder: DecoderPart
    inputs: dict[str, Tensor]

    def encoded(self, inputs: Mapping[str, Tensor]) -> list[dict[str, dict[str, Tensor]]]:
        """What the float model makes of `inputs`, with an empty cache beside it."""
        layers = self.encoder.evaluated(**inputs)["present"]
        empty = {"key": layers[0]["encoder"]["key"][:, :, :0], "value": layers[0]["encoder"]["value"][:, :, :0]}
        return [{"decoder": dict(empty), **layer} for layer in layers]

    def step(
        self, inputs: Mapping[str, Tensor], ids: Tensor, past: list[dict[str, dict[str, Tensor]]]
    ) -> dict[str, Any]:
        """What the decoder takes for new tokens `ids`."""
        found: dict[str, Any] = {"input_ids": ids, "past_key_values": past}
        if _MASK in inputs:
            found["encoder_attention_mask"] = inputs[_MASK]
        return found

    def after(
        self, step: Mapping[str, Any], past: list[dict[str, dict[str, Tensor]]]
    ) -> list[dict[str, dict[str, Tensor]]]:
        """The cache behind `step` of the float model."""
        present = self.decoder.evaluated(**step)["present"]
        return [{**old, **new} for old, new in zip(past, present, strict=True)]


def parts_of(model: Any, cache: Cache, kwargs: Mapping[str, Any] | None) -> Parts:
    """Both parts of `model`.

    Raises:
        CaptureError: it has not both, has another cache, or there are no inputs of its encoder.
    """
    name = type(model).__name__
    if not is_encoder_decoder(model):
        raise CaptureError(f"{name} has no encoder and decoder: leave the part out of cache=")
    if cache.kind != "dynamic":
        raise CaptureError(f"the cache of {name}, an encoder with a decoder, is dynamic; a static one is not supported")
    main = str(getattr(model, "main_input_name", "input_ids"))
    inputs = {key: value for key, value in (kwargs or {}).items() if key in (main, _MASK) and value is not None}
    if main not in inputs:
        raise CaptureError(f"{name} encodes {main}: give an example of it, kwargs={{{main!r}: ...}}")
    if inputs[main].shape[0] == 1:  # for which torch.export makes a program of its own
        inputs = {key: torch.cat([value, value]) for key, value in inputs.items()}
    parts = Parts(EncoderPart(model), DecoderPart(model, last=cache.logits == "last"), inputs)
    try:
        layers = parts.encoded(inputs)
    except Exception as error:  # whatever a model raises that has no such cache
        raise CaptureError(f"{name} does not run with a key/value cache: {first_line(error)}") from error
    if not layers:
        raise CaptureError(f"{name} gives no keys and values of its encoder")
    return parts


def captured_part(
    model: Any, cache: Cache, calibration: Any, kwargs: Mapping[str, Any] | None
) -> tuple[ExportedProgram, Any]:
    """The program of one part of `model`, and `calibration` as it takes it.

    Raises:
        CaptureError: as of `parts_of`, or no part was asked for.
    """
    if cache.part is None:
        raise CaptureError(
            f"{type(model).__name__} is an encoder and a decoder, which are two programs: quantize it twice, with"
            " cache=Cache(part='encoder') and cache=Cache(part='decoder')"
        )
    parts = parts_of(model, cache, kwargs)
    batch = Dim("batch", min=1)
    sizes: dict[str, Any] = {
        key: {0: batch, **({1: Dim("encoded", min=1)} if value.ndim == 2 else {})}
        for key, value in parts.inputs.items()
    }
    if cache.part == "encoder":
        program = capture(parts.encoder, (), parts.inputs, dynamic_shapes=sizes)
        _drop_unread(program)
    else:
        example = _example(parts)
        sizes = _sizes(parts, batch, len(example["past_key_values"]))
        program = capture(parts.decoder, (), example, dynamic_shapes=sizes)
    if calibration is None or (isinstance(calibration, Mapping) and next(iter(parts.inputs)) not in calibration):
        return program, calibration
    batches = [calibration] if isinstance(calibration, Mapping) else calibration
    return program, PartBatches(parts, batches, encoder=cache.part == "encoder")


def _example(parts: Parts) -> dict[str, Any]:
    first = next(iter(parts.inputs.values()))
    past = parts.encoded(parts.inputs)
    ids = torch.zeros((first.shape[0], _PAST), dtype=torch.int64, device=first.device)
    past = parts.after(parts.step(parts.inputs, ids, past), past)
    return parts.step(parts.inputs, ids[:, :_NEW], past)


def _sizes(parts: Parts, batch: Dim, count: int) -> dict[str, Any]:
    past, encoded = Dim("past", min=0), Dim("encoded", min=1)
    is_long = next(iter(parts.inputs.values())).ndim == 2  # token ids; a feature extractor gives one length
    kept = {0: batch, 2: past}
    given = {0: batch, 2: encoded} if is_long else {0: batch}
    layer = {"decoder": {"key": kept, "value": kept}, "encoder": {"key": given, "value": given}}
    found: dict[str, Any] = {"input_ids": {0: batch, 1: Dim("sequence", min=1)}, "past_key_values": [layer] * count}
    if _MASK in parts.inputs:
        found["encoder_attention_mask"] = {0: batch, 1: encoded} if is_long else {0: batch}
    return found


def _drop_unread(program: ExportedProgram) -> None:
    """Leave out what no output of `program` is computed from: the decoder, which ran to have its caches filled."""
    output = program.graph.output_node()
    read = ancestors([output])
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and node not in read:
            program.graph.erase_node(node)
    program.graph_module.recompile()


@dataclass(frozen=True)
class PartBatches(Iterable[Any]):
    """Batches of a model as batches of one of its parts: of the decoder without a past and with one."""

    parts: Parts
    batches: Iterable[Any]
    encoder: bool

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, batch in enumerate(self.batches):
            inputs = {name: batch[name] for name in self.parts.inputs if name in batch}
            if len(inputs) < len(self.parts.inputs):
                raise CalibrationError(f"batch {index} has no {' or '.join(self.parts.inputs.keys() - inputs.keys())}")
            if self.encoder:
                yield inputs
                continue
            ids = batch.get("decoder_input_ids")
            if not isinstance(ids, Tensor) or ids.ndim != 2:
                raise CalibrationError(f"batch {index} has no decoder_input_ids [batch, tokens] for the decoder")
            past, half = self.parts.encoded(inputs), (ids.shape[1] + 1) // 2
            prompt = self.parts.step(inputs, ids[:, :half], past)
            yield prompt
            if half < ids.shape[1]:
                yield self.parts.step(inputs, ids[:, half:], self.parts.after(prompt, past))
