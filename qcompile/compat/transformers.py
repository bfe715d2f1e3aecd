"""Private names of transformers, which is imported by who has a model of it, and by no function here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from passes.private import Private

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
"""Attributes of a configuration that say by which functions attention and experts are computed."""

_CHECKPOINTS, _LOAD = "reading and writing checkpoints", "load_checkpoint"


def may_lack(model: Any) -> tuple[str, ...]:
    """Patterns of the names that a checkpoint of `model` may be without."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def never_saved(model: Any) -> tuple[str, ...]:
    """Names that `save_pretrained` leaves out."""
    return tuple(model._keys_to_ignore_on_save or ())


def from_config(model_class: Any, config: Any) -> Any:
    """A model with the weights that its class begins with; classes that choose a class say it in public."""
    make = getattr(model_class, "_from_config", None) or model_class.from_config
    return make(config)


def kept_in_float32(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Names of the parts of `model`, loaded in `dtype`, that transformers would load in another one."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def is_initialized(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, which transformers then does not give values to."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def attention_of(config: Any) -> str | None:
    """What computes the attention of the model of `config`."""
    found: str | None = config._attn_implementation
    return found


def set_attention(config: Any, name: str) -> None:
    """Let `name` compute the attention of this configuration; without "_internal" its parts would change, too."""
    config._attn_implementation_internal = name


def can_set_attention(model: Any) -> bool:
    """Whether `model` asks its configuration what computes attention."""
    return bool(model._can_set_attn_implementation())


def experts_of(config: Any) -> str | None:
    """What computes the mixtures of experts of the model of `config`."""
    found: str | None = config._experts_implementation
    return found


def set_experts(config: Any, name: str | None) -> None:
    """As `set_experts_implementation` does: the setter without "_internal" would change every sub-configuration."""
    config._experts_implementation_internal = name


def has_experts_interface(module: Any) -> bool:
    """Whether `use_experts_implementation` decorated the class of `module`."""
    return (
        callable(getattr(module, "_apply_gate", None))
        and hasattr(module, "is_transposed")
        and hasattr(getattr(module, "config", None), "_experts_implementation_internal")
    )


def probes() -> Iterator[Private]:
    """Every private name that this module knows."""
    model = "PreTrainedModel."
    yield Private("transformers", f"{model}_keys_to_ignore_on_load_missing", _CHECKPOINTS)
    yield Private("transformers", f"{model}_keys_to_ignore_on_save", _CHECKPOINTS)
    yield Private("transformers", f"{model}_from_config", _CHECKPOINTS, callable)
    yield Private("transformers", f"{model}_get_dtype_plan", _LOAD, callable)
    yield Private("transformers", f"{model}_can_set_attn_implementation", _LOAD, callable)
    yield Private("transformers", "PretrainedConfig", "an FP8 key/value cache", _keeps_implementations)
    yield Private("transformers.initialization", "zeros_", _LOAD, _heeds_mark)
    yield Private("transformers.integrations.moe", "ExpertsInterface.register", "mixtures of experts", callable)


def _heeds_mark(zeros: Any) -> bool:
    import torch

    plain, marked = torch.ones(1), is_initialized(torch.ones(1))
    zeros(plain)
    zeros(marked)
    return plain.item() == 0 and marked.item() == 1


def _keeps_implementations(config_class: Any) -> bool:
    config = config_class()
    set_attention(config, "sdpa")
    set_experts(config, "eager")
    return attention_of(config) == "sdpa" and experts_of(config) == "eager"
