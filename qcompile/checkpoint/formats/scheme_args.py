"""Schemes in the words of compressed-tensors (its `QuantizationScheme` and `QuantizationArgs`), in both directions.

What is written is what `QuantizationConfig(...).to_dict()` of compressed-tensors 0.20 gives, and its class is not
needed for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from passes.formats import FP8, FP8_1X128, FP8_128X128, FP8_PER_TOKEN, INT8, INT8_PER_TOKEN, NVFP4, Format
from qcompile.messages import value
from qcompile.schemes.scheme import Scheme

_KNOWN_WEIGHTS = "FP8 (tensor, channel, block 128 x 128), INT8 (tensor, channel), NVFP4 (tensor_group 16); symmetric"
_KNOWN_INPUTS = "FP8 (tensor, token, group 128), INT8 (tensor, token), NVFP4 (tensor_group 16, local); symmetric"


def _args(bits: int, type: str, strategy: str, *, dynamic: bool | str = False, **more: Any) -> dict[str, Any]:
    args = {"num_bits": bits, "type": type, "symmetric": True, "group_size": None, "strategy": strategy}
    return {**args, "dynamic": dynamic, **more}


_FP4: dict[str, Any] = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
KV_CACHE = _args(8, "float", "tensor")

_INPUTS: dict[Format, dict[str, Any]] = {
    FP8: _args(8, "float", "tensor"),
    FP8_PER_TOKEN: _args(8, "float", "token", dynamic=True),
    FP8_1X128: _args(8, "float", "group", dynamic=True, group_size=128),
    INT8: _args(8, "int", "tensor"),
    INT8_PER_TOKEN: _args(8, "int", "token", dynamic=True),
    NVFP4: _args(4, "float", "tensor_group", dynamic="local", **_FP4),
}


def group_of(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """An entry of `config_groups`."""
    channel = "channel" if scheme.per_channel else "tensor"
    weights = {
        FP8: _args(8, "float", channel),
        FP8_128X128: _args(8, "float", "block", block_structure=[128, 128]),
        INT8: _args(8, "int", channel),
        NVFP4: _args(4, "float", "tensor_group", **_FP4),
    }[scheme.weight]
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": _INPUTS[scheme.input] if scheme.input else None,
        "output_activations": None,
        "format": _format(scheme),
    }


def _format(scheme: Scheme) -> str:
    if scheme.weight == NVFP4:
        return "nvfp4-pack-quantized"
    if scheme.weight == INT8:
        return "int-quantized"
    # float-quantized means activations, too: compressed-tensors takes weight-only for naive
    return "float-quantized" if scheme.input else "naive-quantized"


def scheme_of(group: Mapping[str, Any]) -> Scheme:
    """The scheme of an entry of `config_groups`. Raises `ValueError` that says what is not known."""
    if group.get("output_activations"):
        raise ValueError("output_activations are not known")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not weights:
        raise ValueError("no weights: schemes for activations alone are not known")
    kind, strategy = _kind(weights), _strategy(weights)
    weight = _weight(kind, strategy, weights)
    if weight is None or weights.get("dynamic") or weights.get("symmetric", True) is not True:
        raise ValueError(f"weights {value(_short(weights))}; known: {_KNOWN_WEIGHTS}")
    scheme = Scheme(weight, _input(weight, inputs) if inputs else None, per_channel=strategy == "channel")
    if weight == INT8 and scheme.input is None:
        raise ValueError("INT8 weights without INT8 activations are not known")
    return scheme


def _weight(kind: tuple[str, int], strategy: str, args: Mapping[str, Any]) -> Format | None:
    if kind == ("float", 4):
        return NVFP4 if (strategy, args.get("group_size")) == ("tensor_group", 16) else None
    if kind == ("float", 8) and strategy == "block":
        return FP8_128X128 if _blocks(args.get("block_structure")) == [128, 128] else None
    formats = {("float", 8): FP8, ("int", 8): INT8}
    return formats.get(kind) if strategy in ("tensor", "channel") else None


def _input(weight: Format, args: Mapping[str, Any]) -> Format:
    kind, strategy, dynamic = _kind(args), _strategy(args), args.get("dynamic", False)
    found: Format | None = None
    if kind == ("float", 4) and weight == NVFP4 and strategy == "tensor_group" and dynamic == "local":
        found = NVFP4 if args.get("group_size") == 16 else None
    elif kind == ("float", 8) and weight == FP8_128X128 and dynamic is True:
        # servers take the blocks of the weight for activations, whatever older files say here
        found = FP8_1X128
    elif kind in (("float", 8), ("int", 8)) and weight == (FP8 if kind[0] == "float" else INT8):
        static, per_token = (FP8, FP8_PER_TOKEN) if weight == FP8 else (INT8, INT8_PER_TOKEN)
        if strategy == "tensor" and dynamic is False:
            found = static
        elif strategy in ("tensor", "token") and dynamic is True:
            # servers measure each token where a dynamic scale is said to be for the tensor
            found = per_token
    if found is None or args.get("symmetric", True) is not True:
        raise ValueError(f"input_activations {value(_short(args))} for {weight.name} weights; known: {_KNOWN_INPUTS}")
    return found


def _kind(args: Mapping[str, Any]) -> tuple[str, int]:
    return str(args.get("type", "int")).lower(), int(args.get("num_bits", 8))


def _strategy(args: Mapping[str, Any]) -> str:
    """Older files leave it to the size of the group."""
    if args.get("strategy"):
        return str(args["strategy"]).lower()
    size = args.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _blocks(structure: Any) -> list[int] | None:
    """`[128, 128]`, or as older files have it `"128x128"`."""
    if isinstance(structure, str):
        return [int(size) for size in structure.split("x")]
    return None if structure is None else list(structure)


def _short(args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in args.items() if value is not None and not key.startswith("observer")}
