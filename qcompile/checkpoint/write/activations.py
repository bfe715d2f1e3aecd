"""Constant scales of activations in checkpoints that no program is made for, and what has a key/value cache."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

from passes.formats import FP8
from qcompile.algorithms.scales import scale_of
from qcompile.checkpoint.hub.layout import Hub
from qcompile.errors import CheckpointError
from qcompile.messages import some
from qcompile.recipe import QuantizerConfig, format_of
from qcompile.recipe.globs import ATTENTION

K, V = ATTENTION[1:3]
KvScales = tuple[torch.Tensor, torch.Tensor]
"""fp32 scalars, of the keys and of the values."""


def known_scale(config: QuantizerConfig, power_of_two: bool) -> torch.Tensor | None:
    """The scale of an activation whose largest magnitude the recipe says."""
    if config.constant_amax is None:
        return None
    return scale_of(torch.tensor(config.constant_amax, dtype=torch.float32), config, power_of_two)


def cache_scales(
    configs: Mapping[str, QuantizerConfig], hub: Hub, power_of_two: bool
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Path of each attention whose key/value cache is FP8 -> its (k, v) scales, None for one from calibration."""
    found = {}
    for path in (path for path, attention in hub.attentions.items() if attention.cached):
        k, v = (configs.get(f"{path}.{kind}") for kind in (K, V))
        is_fp8 = [config is not None and format_of(config) == FP8 for config in (k, v)]
        if is_fp8[0] != is_fp8[1]:
            raise CheckpointError(f"{path}: one of k and v is quantized to FP8, and a key/value cache holds both")
        if k is not None and v is not None and all(is_fp8):
            found[path] = known_scale(k, power_of_two), known_scale(v, power_of_two)
    refuse_latent(found, hub)
    return found


def refuse_latent(paths: Iterable[str], hub: Hub) -> None:
    """Raise `CheckpointError` for attentions whose cache holds no keys and values."""
    if latent := [path for path in paths if hub.attentions[path].latent]:
        raise CheckpointError(
            f"{some(latent)}: k and v are quantized, and the cache holds what they are made of (multi-head latent"
            " attention), so servers would scale it with numbers that are not its own: leave them out, by a rule such"
            ' as {quantizer: "*.[qkv]_bmm_quantizer", enable: false}, or take the recipe fp8_gemm'
        )


def uncovered(scaled: Collection[str], hub: Hub) -> list[str]:
    """A notice of the attentions without scales beside others that have them."""
    left = [path for path, attention in hub.attentions.items() if scaled and attention.cached and path not in scaled]
    return [f"{some(left)} without scales for the key/value cache: servers take 1"] if left else []
