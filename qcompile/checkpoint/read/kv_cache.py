"""FP8 key/value caches of checkpoints: keys and values quantized where the attention of transformers reads them."""

from __future__ import annotations

import importlib
import logging
import re
import sys
from typing import Any

import torch

from passes.formats import FP8
from passes.ir import DEQUANTIZE, QUANTIZE
from qcompile.checkpoint.formats import SchemeReader
from qcompile.checkpoint.hub.names import HubNames
from qcompile.checkpoint.read.store import TensorStore
from qcompile.compat.transformers import attention_of, can_set_attention, set_attention
from qcompile.errors import CheckpointError

logger = logging.getLogger(__name__)
NAME = "qcompile_fp8_kv"
_SCALE = re.compile(r"(?P<attention>.+?)(\.[kv]_proj)?\.([kv]_scale|(?<=_proj\.)output_scale)$")

Scales = dict[str, tuple[torch.Tensor, torch.Tensor]]


def read_kv_scales(
    model: torch.nn.Module, names: HubNames, reader: SchemeReader, store: TensorStore, *, complete: bool = True
) -> Scales:
    """Path of each attention whose key/value cache is FP8 -> its scales `(k, v)`, fp32 scalars.

    Where the configuration says that the cache is FP8 and the files have no scale at all, as where Model Optimizer
    casts keys and values (`kv_fp8_cast`), they are 1, as for servers.

    Args:
        complete: every attention has to have scales if the cache is FP8.

    Raises:
        CheckpointError: the cache is FP8, some attentions have scales, and one has not.
    """
    found: Scales = {}
    for attention in dict.fromkeys(match["attention"] for name in store if (match := _SCALE.match(name))):
        place = names.place(f"{attention}.k_proj.weight")
        path = place.path.removesuffix(".k_proj.weight") if place else names.renamed(attention)
        if (scales := reader.kv_scales(attention, store.get)) is not None:
            found[path] = scales
    if reader.kv_cache and complete:
        attentions = [name.removesuffix(".k_proj") for name, _ in model.named_modules() if name.endswith(".k_proj")]
        if lacking := [path for path in attentions if path not in found]:
            if found:
                raise CheckpointError(
                    f"{store.directory}: the configuration says that the key/value cache is FP8, and {lacking[0]} has"
                    " no k_scale and v_scale beside others that have; add them, or take the key/value cache out of the"
                    " configuration"
                )
            logger.info("%s: the key/value cache is FP8, and no scale is there: it is 1", store.directory)
            found = {path: (torch.ones(()), torch.ones(())) for path in lacking}
    return found


def attach_kv_scales(model: Any, scales: Scales) -> None:
    """Let each attention of `scales` quantize and dequantize its keys and values, rotated and not yet repeated.

    Raises:
        CheckpointError: the attention is none that transformers' `AttentionInterface` dispatches, so that there is no
            place where this could be done.
    """
    for path in scales:
        if reason := _misfit(model, path):
            raise CheckpointError(
                f"{path} has scales for an FP8 key/value cache, and {reason}; take the key/value cache out of the"
                " configuration and of the files to compute it in half precision"
            )
    modeling = importlib.import_module("transformers.modeling_utils")
    masking = importlib.import_module("transformers.masking_utils")
    modeling.AttentionInterface.register(NAME, fp8_kv_attention)
    masking.AttentionMaskInterface.register(NAME, masking.sdpa_mask)
    configs: dict[int, Any] = {}
    for path, pair in scales.items():
        attention = model.get_submodule(path)
        for name, scale in zip(("k_scale", "v_scale"), pair, strict=True):
            attention.register_buffer(name, scale)
        configs[id(attention.config)] = attention.config
    for config in configs.values():
        set_attention(config, NAME)


def fp8_kv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention implementation for transformers: "sdpa" on keys and values as an FP8 cache gives them back.

    Args:
        module: an attention with the buffers `k_scale` and `v_scale`; without them this is "sdpa".
        key, value: `[B, Hkv, S, D]`.
    """
    if hasattr(module, "k_scale"):
        key, value = _through_fp8(key, module.k_scale), _through_fp8(value, module.v_scale)
    result: tuple[torch.Tensor, torch.Tensor | None] = _interface(module)["sdpa"](
        module, query, key, value, attention_mask, **kwargs
    )
    return result


def _through_fp8(x: torch.Tensor, scale: Any) -> torch.Tensor:
    result: torch.Tensor = DEQUANTIZE(QUANTIZE(x, scale, format=FP8.name), scale, format=FP8.name, dtype=x.dtype)
    return result


def _misfit(model: Any, path: str) -> str | None:
    try:
        attention = model.get_submodule(path)
    except AttributeError:
        return "the model has no such module"
    if _interface(attention) is None or not can_set_attention(model):
        return f"{type(attention).__name__} does not call transformers' attention interface, where they would apply"
    if not hasattr(attention, "config") or attention_of(attention.config) != "sdpa":
        return f"{type(attention).__name__} does not run as scaled_dot_product_attention, where they would apply"
    if hasattr(attention, "kv_lora_rank"):
        return "its cache is not that of keys and values (multi-head latent attention)"
    return None


def _interface(attention: torch.nn.Module) -> Any:
    """The attention functions that the file of the module's class dispatches to, some models have their own."""
    return getattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS", None)
