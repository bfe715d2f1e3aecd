"""A module as it is captured, and afterwards as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_REGISTERED = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def for_inference(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and, for Hugging Face models, no key/value cache; everything is put back on the way out.

    So is what torch.export has in the place of weights, and what `forward` sets: all of that is fake, and torch takes
    it out again unless it is cut off.
    """
    kept = [(module, dict(vars(module)), _registered(module)) for module in model.modules()]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    cached = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    try:
        for module, _, _ in kept:
            for refusal in ("eval", "train"):  # by which graphs of torch.export and pt2e refuse both
                module.__dict__.pop(refusal, None)
        model.eval()
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for config in cached:
            config.use_cache = True
        for module, attributes, registered in kept:
            _put_back(module.__dict__, attributes)
            for name, entries in registered.items():
                _put_back(attributes[name], entries)


def _registered(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(module)[name]) for name in _REGISTERED}


def _put_back(found: dict[str, Any], kept: dict[str, Any]) -> None:
    """Make `found` what it was, in its order: that is the order of weights."""
    same = list(found) == list(kept) and all(found[key] is value for key, value in kept.items())
    if not same:
        found.clear()
        found.update(kept)
