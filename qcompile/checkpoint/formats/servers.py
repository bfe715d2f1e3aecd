"""What servers do not load, or load wrongly, of what is written: one table, for the notices of reports and the docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from passes.formats import INT8, INT8_PER_TOKEN, NVFP4
from qcompile.checkpoint.formats.base import Contents
from qcompile.checkpoint.formats.merged import expert_container, is_merged
from qcompile.layer import FP8_CHANNEL_TOKEN, FP8_TENSOR, Scheme
from qcompile.messages import some

VLLM, SGLANG, EDGE = "vLLM 0.33.0", "SGLang 0.5.23", "TensorRT Edge-LLM 0.11.0"


@dataclass(frozen=True)
class Limit:
    """One thing that a server does not load.

    Attributes:
        server: with the version that it was seen with.
        formats: of checkpoints.
        what: is not loaded, in words.
        effect: what the server does instead.
        instead: what to write for it.
        layers: those of a checkpoint that this is about, none if it does not apply.
    """

    server: str
    formats: tuple[str, ...]
    what: str
    effect: str
    instead: str
    layers: Callable[[Contents], list[str]]

    def notice(self, names: list[str]) -> str:
        return f"{some(names)}: {self.server} {self.effect} ({self.what}); {self.instead}"


def server_notices(format_name: str, contents: Contents) -> list[str]:
    """The limits that a checkpoint of that format runs into."""
    of_format = (limit for limit in LIMITS if format_name in limit.formats)
    return [limit.notice(names) for limit in of_format if (names := limit.layers(contents))]


def _in(*schemes: Scheme, experts: bool | None = None) -> Callable[[Contents], list[str]]:
    """The layers that have one of `schemes`: of mixtures of experts, of others, or all."""

    def layers(contents: Contents) -> list[str]:
        return [
            name
            for name, scheme in contents.schemes.items()
            if scheme in schemes and experts in (None, expert_container(name) is not None)
        ]

    return layers


def _all(contents: Contents) -> list[str]:
    return list(contents.schemes)


def _dense(contents: Contents) -> list[str]:
    return [] if any(map(expert_container, contents.schemes)) else list(contents.schemes)


def _mixed_dense(contents: Contents) -> list[str]:
    """The layers of a model without experts, if those that servers merge do not all have one scheme."""
    floating = any(map(is_merged, contents.unquantized))
    return _dense(contents) if floating or len(set(contents.schemes.values())) > 1 else []


def _without_nvfp4(contents: Contents) -> list[str]:
    return [] if any(scheme.weight == NVFP4 for scheme in contents.schemes.values()) else list(contents.schemes)


def _several(layers: Callable[[Contents], list[str]]) -> Callable[[Contents], list[str]]:
    """`layers` of a checkpoint with several schemes."""
    return lambda contents: layers(contents) if len(set(contents.schemes.values())) > 1 else []


_STATIC_INT8 = (Scheme(INT8, INT8), Scheme(INT8, INT8, per_channel=True))
_TOKEN_INT8 = (Scheme(INT8, INT8_PER_TOKEN), Scheme(INT8, INT8_PER_TOKEN, per_channel=True))
_MODELOPT, _COMPRESSED = ("modelopt", "modelopt_mixed"), ("compressed-tensors",)
_TAKE_COMPRESSED = "use the format compressed-tensors"
_TAKE_TOKENS = "use the recipe int8_per_channel_per_token"

LIMITS = (
    Limit(
        VLLM,
        ("modelopt",),
        "FP8_PER_CHANNEL_PER_TOKEN in experts",
        "stops while it loads them",
        _TAKE_COMPRESSED,
        _in(FP8_CHANNEL_TOKEN, experts=True),
    ),
    Limit(
        VLLM,
        _COMPRESSED,
        "INT8 with static activations in experts",
        "refuses them",
        _TAKE_TOKENS,
        _in(*_STATIC_INT8, experts=True),
    ),
    Limit(
        SGLANG,
        _MODELOPT,
        "FP8_PER_CHANNEL_PER_TOKEN",
        "refuses the checkpoint",
        _TAKE_COMPRESSED,
        _in(FP8_CHANNEL_TOKEN),
    ),
    Limit(
        SGLANG,
        _COMPRESSED,
        "INT8 with static activations",
        "stops while it loads them",
        f"{_TAKE_TOKENS} for dense models, FP8 for experts",
        _in(*_STATIC_INT8),
    ),
    Limit(
        SGLANG,
        _COMPRESSED,
        "INT8 in experts",
        "refuses them but on NPUs",
        "use FP8",
        _in(*_TOKEN_INT8, experts=True),
    ),
    Limit(
        SGLANG,
        ("fp8",),
        "Llama, and models built on its class",
        "loads the codes without their scales and only logs it",
        f"{_TAKE_COMPRESSED} for these",
        _dense,
    ),
    Limit(
        SGLANG,
        _COMPRESSED,
        "several schemes, or floating q, k, v, gate or up, in a dense model",
        "stops, or for Llama leaves out those layers and only logs it",
        "use the format modelopt with one scheme",
        _mixed_dense,
    ),
    Limit(
        SGLANG,
        ("modelopt_mixed",),
        "a dense model",
        "stops while it loads them",
        "use the format modelopt",
        _dense,
    ),
    Limit(
        SGLANG,
        ("modelopt",),
        "several schemes in a dense model",
        "stops while it loads them",
        "use one scheme",
        _several(_dense),
    ),
    Limit(
        SGLANG,
        ("modelopt_mixed",),
        "no layer in NVFP4",
        "takes the checkpoint for W4AFP8",
        "use the format modelopt",
        _without_nvfp4,
    ),
    Limit(
        SGLANG,
        ("modelopt",),
        "several schemes, none of them NVFP4",
        "takes the checkpoint for W4AFP8",
        "use the format compressed-tensors",
        _several(_without_nvfp4),
    ),
    Limit(
        EDGE,
        ("fp8", *_COMPRESSED),
        "any scheme",
        "takes codes for float16 without a word",
        "use the format modelopt",
        _all,
    ),
    Limit(
        EDGE,
        _MODELOPT,
        "FP8_PER_CHANNEL_PER_TOKEN",
        "takes it for static FP8 and finds no scales of inputs",
        "use the recipe fp8",
        _in(FP8_CHANNEL_TOKEN),
    ),
    Limit(
        EDGE,
        _MODELOPT,
        "FP8 in experts",
        "stops",
        "use NVFP4 there",
        _in(FP8_TENSOR, experts=True),
    ),
    Limit(
        EDGE,
        ("modelopt",),
        "W4A16_NVFP4 alone",
        "takes it for NVFP4 with activations",
        "use the format modelopt_mixed",
        lambda contents: _in(Scheme(NVFP4))(contents) if len(set(contents.schemes.values())) == 1 else [],
    ),
)
