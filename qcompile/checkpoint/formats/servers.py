"""What servers do not load, or load wrongly, of what is written: one table, for the notices of reports and the docs."""

from __future__ import annotations

from passes.formats import FP8_128X128, INT4_GROUPS, INT8, INT8_PER_TOKEN, NVFP4
from qcompile.checkpoint.formats.base import Contents
from qcompile.checkpoint.formats.limits import (
    Limit,
    dense,
    experts,
    floating,
    mixed_dense,
    mostly,
    no_experts,
    not_nvfp4,
    nvfp4,
    nvfp4_or_floating,
    of_scheme,
    several,
    without_nvfp4,
)
from qcompile.schemes.scheme import FP8_CHANNEL_TOKEN, Scheme

VLLM, SGLANG, EDGE = "vLLM 0.33.0", "SGLang 0.5.23", "TensorRT Edge-LLM 0.11.0"


def server_notices(format_name: str, contents: Contents) -> list[str]:
    """The limits that a checkpoint of that format runs into."""
    of_format = (limit for limit in LIMITS if format_name in limit.formats)
    return [limit.notice(names) for limit in of_format if (names := limit.layers(contents))]


_STATIC_INT8 = (Scheme(INT8, INT8), Scheme(INT8, INT8, per_channel=True))
_TOKEN_INT8 = (Scheme(INT8, INT8_PER_TOKEN), Scheme(INT8, INT8_PER_TOKEN, per_channel=True))
_MODELOPT, _COMPRESSED = ("modelopt", "modelopt_mixed"), ("compressed-tensors",)
_TAKE_COMPRESSED = "use the format compressed-tensors"
_TAKE_TOKENS = "use the recipe int8_per_channel_per_token"

LIMITS = (
    Limit(
        VLLM,
        _MODELOPT,
        "INT4 (W4A16_AWQ)",
        "refuses the checkpoint",
        _TAKE_COMPRESSED,
        of_scheme(*(Scheme(fmt) for fmt in INT4_GROUPS.values())),
    ),
    Limit(
        VLLM,
        ("modelopt",),
        "FP8_PER_CHANNEL_PER_TOKEN in experts",
        "stops while it loads them",
        _TAKE_COMPRESSED,
        experts(of_scheme(FP8_CHANNEL_TOKEN)),
    ),
    Limit(
        VLLM,
        _COMPRESSED,
        "INT8 with static activations in experts",
        "refuses them",
        _TAKE_TOKENS,
        experts(of_scheme(*_STATIC_INT8)),
    ),
    Limit(
        SGLANG,
        _MODELOPT,
        "FP8_PER_CHANNEL_PER_TOKEN",
        "refuses the checkpoint",
        _TAKE_COMPRESSED,
        of_scheme(FP8_CHANNEL_TOKEN),
    ),
    Limit(
        SGLANG,
        _COMPRESSED,
        "INT8 with static activations",
        "stops while it loads them",
        f"{_TAKE_TOKENS} for dense models, FP8 for experts",
        of_scheme(*_STATIC_INT8),
    ),
    Limit(
        SGLANG,
        _COMPRESSED,
        "INT8 in experts",
        "refuses them but on NPUs",
        "use FP8",
        experts(of_scheme(*_TOKEN_INT8)),
    ),
    Limit(
        SGLANG,
        ("fp8",),
        "Llama, and models built on its class",
        "loads the codes without their scales and only logs it",
        f"{_TAKE_COMPRESSED} for these",
        dense,
    ),
    Limit(
        SGLANG,
        _COMPRESSED,
        "several schemes, or floating q, k, v, gate or up, in a dense model",
        "stops, or for Llama leaves out those layers and only logs it",
        "use the format modelopt with one scheme",
        mixed_dense,
    ),
    Limit(
        SGLANG,
        ("modelopt_mixed",),
        "a dense model",
        "stops while it loads them",
        "use the format modelopt",
        dense,
    ),
    Limit(
        SGLANG,
        ("modelopt",),
        "several schemes in a dense model",
        "stops while it loads them",
        "use one scheme",
        several(dense),
    ),
    Limit(
        SGLANG,
        ("modelopt_mixed",),
        "no layer in NVFP4",
        "takes the checkpoint for W4AFP8",
        "use the format modelopt",
        without_nvfp4,
    ),
    Limit(
        SGLANG,
        ("modelopt",),
        "several schemes, none of them NVFP4",
        "takes the checkpoint for W4AFP8",
        "use the format compressed-tensors",
        several(without_nvfp4),
    ),
    Limit(
        EDGE,
        ("fp8", *_COMPRESSED),
        "FP8 or INT8",
        "takes codes for float16 and leaves out their scales, without a word",
        "use the format modelopt with the recipe fp8, or nvfp4 for experts",
        not_nvfp4,
    ),
    Limit(
        EDGE,
        _COMPRESSED,
        "NVFP4",
        "leaves their weights uninitialized, without a word",
        "use the format modelopt",
        nvfp4,
    ),
    Limit(
        EDGE,
        _MODELOPT,
        "W4A16_NVFP4, that of Nemotron-H in modelopt_mixed aside",
        "takes it for NVFP4 with activations, whose scales are 1",
        "use the recipe nvfp4",
        of_scheme(Scheme(NVFP4)),
    ),
    Limit(
        EDGE,
        _MODELOPT,
        "FP8_PER_CHANNEL_PER_TOKEN in layers that are no experts",
        "takes it for FP8 with static scales of inputs, which are 1",
        "use the recipe fp8",
        no_experts(of_scheme(FP8_CHANNEL_TOKEN)),
    ),
    Limit(
        EDGE,
        _MODELOPT,
        "FP8_PB_WO in layers that are no experts",
        "takes it for MXFP8",
        "use the recipe fp8",
        no_experts(of_scheme(Scheme(FP8_128X128))),
    ),
    Limit(
        EDGE,
        _MODELOPT,
        "FP8 in experts",
        "stops while it loads them",
        "use NVFP4 there",
        experts(not_nvfp4),
    ),
    Limit(
        EDGE,
        _MODELOPT,
        "experts in NVFP4 or floating point among more layers in FP8, the experts of a layer counted as one",
        "takes the experts for FP8, too, and stops",
        "use the recipe nvfp4 or nvfp4_mlp_only",
        mostly(experts(nvfp4_or_floating), fp4=False),
    ),
    Limit(
        EDGE,
        _MODELOPT,
        "floating-point experts among layers in NVFP4",
        "quantizes the experts to NVFP4, too, without a word",
        "use the recipe nvfp4 or nvfp4_mlp_only",
        mostly(experts(floating), fp4=True),
    ),
)
