"""A decoder of transformers as a module that takes its cache and gives it back."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from qcompile.capture.inference import for_inference
from qcompile.compat.torch import check_size

Layers = list[dict[str, Tensor]]


class Around(torch.nn.Module):
    """A module with the parts of `model`, under their names, that is called in another way."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules"):
            setattr(self, name, getattr(model, name))
        self.training = model.training
        self.config = model.config
        self._call = [model.forward]  # in a list, where torch does not find a module

    def evaluated(self, **inputs: Any) -> dict[str, Any]:
        """What the float model gives for `inputs`; it is left as it was."""
        with for_inference(self), torch.no_grad():
            given: dict[str, Any] = self(**inputs)
        return given


class WithCache(Around):
    """A decoder with a cache among its inputs and outputs.

    Args:
        last: give the logits of the last position only.
    """

    def __init__(self, model: Any, *, last: bool = False) -> None:
        super().__init__(model)
        takes = inspect.signature(model.forward).parameters
        self.options = {"logits_to_keep": 1} if last and "logits_to_keep" in takes else {}
        self.cuts = last and not self.options

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Layers
    ) -> dict[str, Any]:
        """Logits and the longer cache.

        Args:
            input_ids: `[batch, sequence]`, the new tokens.
            attention_mask: `[batch, past + sequence]`, 0 where a token is padding.
            position_ids: `[batch, sequence]`, positions of the new tokens.
            past_key_values: keys and values `[batch, heads, past, width]` of each layer.
        """
        from transformers import DynamicCache

        before = past_key_values[0]["key"].shape[2]
        check_size(attention_mask.shape[1] == before + input_ids.shape[1])
        cache = DynamicCache()  # of no config: a sliding window is a matter of the mask, and every layer has all tokens
        for index, layer in enumerate(past_key_values):
            cache.update(layer["key"], layer["value"], index)
        return self.run(input_ids, attention_mask, position_ids, cache)

    def run(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any) -> dict[str, Any]:
        """Logits and what the model leaves in `cache`."""
        given = self._call[0](
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            **self.options,
        )
        logits = given.logits[:, -1:] if self.cuts else given.logits
        present = [{"key": layer.keys, "value": layer.values} for layer in given.past_key_values.layers]
        return {"logits": logits, "present": present}
