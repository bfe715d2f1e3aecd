"""Schemes in the words of compressed-tensors (its `QuantizationScheme` and `QuantizationArgs`), in both directions.

What is written is what `QuantizationConfig(...).to_dict()` of compressed-tensors 0.20 gives, and its class is not
needed for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from passes.capabilities import inputs_of
from passes.formats import (
    FP8,
    FP8_1X128,
    FP8_128X128,
    FP8_PER_TOKEN,
    INT4_GROUPS,
    INT8,
    INT8_PER_TOKEN,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
)
from qcompile.messages import value
from qcompile.schemes.scheme import Scheme

_KNOWN_WEIGHTS = (
    "FP8 (tensor, channel, block 128 x 128), INT8 (tensor, channel), INT4 (group 32, 64, 128), NVFP4 (tensor_group 16),"
    " MXFP8 and MXFP4 (group 32); symmetric"
)
_KNOWN_INPUTS = "FP8 (tensor, token, group 128), INT8 (tensor, token), NVFP4 (tensor_group 16, local); symmetric"


def _args(bits: int, type: str, strategy: str, *, dynamic: bool | str = False, **more: Any) -> dict[str, Any]:
    args = {"num_bits": bits, "type": type, "symmetric": True, "group_size": None, "strategy": strategy}
    return {**args, "dynamic": dynamic, **more}


_FP4: dict[str, Any] = {"group_size": NVFP4.sizes[0], "scale_dtype": "torch.float8_e4m3fn"}
_MX: dict[str, Any] = {"group_size": 32, "scale_dtype": "torch.uint8"}
KV_CACHE = _args(8, "float", "tensor")

# float-quantized means activations, too: compressed-tensors takes weight-only for naive
_FLOAT = ("float-quantized", "naive-quantized")

WEIGHTS: dict[Format, tuple[dict[str, Any], str, str | None]] = {
    FP8: (_args(8, "float", "tensor"), *_FLOAT),
    FP8_128X128: (_args(8, "float", "block", block_structure=[128, 128]), *_FLOAT),
    INT8: (_args(8, "int", "tensor"), "int-quantized", None),
    NVFP4: (_args(4, "float", "tensor_group", **_FP4), "nvfp4-pack-quantized", "nvfp4-pack-quantized"),
    MXFP8: (_args(8, "float", "group", **_MX), "mxfp8-quantized", "mxfp8-quantized"),
    MXFP4: (_args(4, "float", "group", **_MX), "mxfp4-pack-quantized", "mxfp4-pack-quantized"),
    **{
        fmt: (_args(4, "int", "group", group_size=size), "pack-quantized", "pack-quantized")
        for size, fmt in INT4_GROUPS.items()
    },
}
"""Format of a weight -> its arguments (`channel` for a scale for each row), and the name of the compressor with an
input that is quantized, too, and without; None where no reader takes it alone."""

_INPUTS: dict[Format, dict[str, Any]] = {
    FP8: _args(8, "float", "tensor"),
    FP8_PER_TOKEN: _args(8, "float", "token", dynamic=True),
    FP8_1X128: _args(8, "float", "group", dynamic=True, group_size=128),
    INT8: _args(8, "int", "tensor"),
    INT8_PER_TOKEN: _args(8, "int", "token", dynamic=True),
    NVFP4: _args(4, "float", "tensor_group", dynamic="local", **_FP4),
    MXFP8: _args(8, "float", "group", dynamic=True, **_MX),
    MXFP4: _args(4, "float", "group", dynamic=True, **_MX),
}

COMPRESSORS = tuple(dict.fromkeys(name for _, *names in WEIGHTS.values() for name in names if name))


def inputs_with(weight: Format) -> tuple[Format | None, ...]:
    """What the input of a layer with that weight can be, None for one that is not quantized; () for another weight."""
    if weight not in WEIGHTS:
        return ()
    alone = (None,) if WEIGHTS[weight][2] else ()
    return (*alone, *(x for x in inputs_of(weight) if x in _INPUTS))


def group_of(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """An entry of `config_groups`."""
    weights, with_input, alone = WEIGHTS[scheme.weight]
    return {
        "targets": targets,
        "weights": {**weights, "strategy": "channel"} if scheme.per_channel else weights,
        "input_activations": _INPUTS[scheme.input] if scheme.input else None,
        "output_activations": None,
        "format": with_input if scheme.input else alone,
    }


def scheme_of(group: Mapping[str, Any]) -> Scheme:
    """The scheme of an entry of `config_groups`. Raises `ValueError` that says what is not known."""
    if group.get("output_activations"):
        raise ValueError("output_activations are not known")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not weights:
        raise ValueError("no weights: schemes for activations alone are not known")
    if str(weights.get("actorder") or "weight").lower() not in ("weight", "static"):
        raise ValueError(f"weights with actorder {value(weights['actorder'])}; known: 'static'")
    weight = _weight(weights)
    if weight is None or weights.get("dynamic") or weights.get("symmetric", True) is not True:
        raise ValueError(f"weights {value(_short(weights))}; known: {_KNOWN_WEIGHTS}")
    scheme = Scheme(weight, _input(weight, inputs) if inputs else None, per_channel=_strategy(weights) == "channel")
    if scheme.input not in inputs_with(weight):
        raise ValueError(f"{weight.name.upper()} weights without {weight.name.upper()} activations are not known")
    return scheme


def _weight(args: Mapping[str, Any]) -> Format | None:
    layout = _layout({**args, "strategy": "tensor"} if _strategy(args) == "channel" else args)
    return next((fmt for fmt, (known, *_) in WEIGHTS.items() if _layout(known) == layout), None)


def _input(weight: Format, args: Mapping[str, Any]) -> Format:
    layout, dynamic = _layout(args), args.get("dynamic", False)
    if dynamic is True and _strategy(args) == "tensor":
        # servers measure each token where a dynamic scale is said to be for the tensor
        layout = _layout({**args, "strategy": "token"})
    found: Format | None = None
    for fmt in inputs_of(weight):
        known = _INPUTS[fmt]
        # servers take the blocks of the weight for activations, whatever older files say here
        alike = _kind(args) == _kind(known) if weight == FP8_128X128 else layout == _layout(known)
        if alike and repr(dynamic) == repr(known["dynamic"]):  # 1 is not true
            found = fmt
    if found is None or args.get("symmetric", True) is not True:
        raise ValueError(f"input_activations {value(_short(args))} for {weight.name} weights; known: {_KNOWN_INPUTS}")
    return found


def _layout(args: Mapping[str, Any]) -> tuple[object, ...]:
    """Type, bits, strategy and the size of blocks: what of the arguments tells the formats apart."""
    strategy = _strategy(args)
    sizes = {"block": _blocks(args.get("block_structure")), "group": args.get("group_size")}
    sizes["tensor_group"] = args.get("group_size")
    return (_kind(args), strategy, repr(sizes.get(strategy)))


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
