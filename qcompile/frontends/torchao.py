"""Models that torchao's `quantize_` worked on: layers whose weight is a subclass with codes and scales."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from passes.formats import FP8, FP8_1X128, FP8_128X128, FP8_PER_TOKEN, INT8, INT8_PER_TOKEN, NVFP4, Format
from qcompile.errors import CaptureError
from qcompile.frontends.torchao_convolution import KINDS, convolution_of
from qcompile.schemes.layer import QuantizedLinear, QuantizedWeight
from qcompile.schemes.scheme import Scheme

__all__ = ["capture_ready", "is_quantized", "is_subclass", "layer_of"]


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a parameter of `model` is a tensor subclass of torchao."""
    return any(is_subclass(parameter) for parameter in model.parameters())


@contextlib.contextmanager
def capture_ready(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Put `QuantizedLinear` in the place of each layer of torchao; the originals are back afterwards.

    Raises:
        CaptureError: names the layer and what about its weight the IR cannot say.
    """
    if is_subclass(getattr(model, "weight", None)):
        raise CaptureError("the model is one layer of torchao itself: put it into a module, e.g. torch.nn.Sequential")
    originals: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    replaced: dict[torch.nn.Module, torch.nn.Module] = {}
    try:
        for path, owner in list(model.named_modules()):
            for leaf, layer in list(owner.named_children()):
                if not any(is_subclass(p) for p in layer.parameters(recurse=False)):
                    continue
                if layer not in replaced:
                    replaced[layer] = _quantized(layer, f"{path}.{leaf}" if path else leaf)
                originals.append((owner, leaf, layer))
                setattr(owner, leaf, replaced[layer])
        yield model
    finally:
        for owner, leaf, layer in originals:
            setattr(owner, leaf, layer)


def is_subclass(tensor: object) -> bool:
    """Whether `tensor` is a tensor or parameter of torchao's own class."""
    return isinstance(tensor, torch.Tensor) and type(tensor.data).__module__.partition(".")[0] == "torchao"


def _quantized(layer: torch.nn.Module, name: str) -> torch.nn.Module:
    """The layer called `name` in the operators of the IR."""
    weight: Any = getattr(layer, "weight", None)
    if isinstance(layer, KINDS) and is_subclass(weight):
        return convolution_of(layer, name)
    if not isinstance(layer, torch.nn.Linear) or not is_subclass(weight):
        raise CaptureError(
            f"{name}: torchao quantized a {type(layer).__name__}; qcompile reads its linear layers and convolutions"
        )
    return layer_of(weight, layer.bias, name)


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None, name: str) -> QuantizedLinear:
    """The linear layer called `name` with a weight of torchao, in the operators of the IR.

    Raises:
        CaptureError: names the layer and what about its weight the IR cannot say.
    """
    data: Any = weight.data
    read = _READERS.get(type(data).__name__)
    if read is None:
        raise CaptureError(
            f"{name}: torchao's {type(data).__name__} is no format that qcompile carries; known: {', '.join(_READERS)}"
        )
    codes = read(data, name)
    scale = getattr(data, "act_pre_scale", None)
    bias = None if bias is None else bias.detach()
    if scale is None:
        return QuantizedLinear(codes, bias, weight.dtype)
    return _Scaled(codes, bias, weight.dtype, scale.detach())


class _Scaled(QuantizedLinear):
    """A layer whose input is multiplied first (SmoothQuant, AWQ)."""

    pre_scale: torch.Tensor

    def __init__(
        self, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype, scale: torch.Tensor
    ) -> None:
        super().__init__(weight, bias, dtype)
        self.register_buffer("pre_scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.pre_scale)


def _float8(data: Any, name: str) -> QuantizedWeight:
    """`Float8Tensor`: e4m3 codes; a scale for the tensor, each row, or each block of 128 x 128."""
    if data.qdata.dtype != torch.float8_e4m3fn or data.qdata.ndim != 2:
        raise CaptureError(
            f"{name}: {data.qdata.dtype} with {data.qdata.ndim} axes; qcompile reads float8_e4m3fn [N, K]"
        )
    n, k = data.qdata.shape
    scale, kinds = _granularity(data.scale, (n, k), name)
    wanted = {"tensor": FP8, "row": FP8, "block": FP8_128X128}[kinds]
    options = data.act_quant_kwargs
    inputs: Format | None = None
    if options is not None:
        if options.hp_value_lb is not None or options.hp_value_ub is not None:
            raise CaptureError(
                f"{name}: bounds on the amax of activations (activation_value_lb, _ub) are not supported"
            )
        inputs = _input(options.granularity, _FP8_INPUTS, name)
        if inputs is FP8_1X128 and kinds == "tensor":  # one block
            wanted, scale = FP8_128X128, scale.reshape(1, 1)
    return QuantizedWeight(Scheme(wanted, inputs, kinds == "row", measured=inputs is FP8), data.qdata, scale)


def _int8(data: Any, name: str) -> QuantizedWeight:
    """`Int8Tensor`: symmetric codes; a scale for the tensor or each row."""
    n, k = data.qdata.shape[-2:]
    scale, kinds = _granularity(data.scale, (n, k), name)
    if data.qdata.ndim != 2 or kinds == "block":
        raise CaptureError(f"{name}: INT8 weights in groups are not supported; quantize them per row or per tensor")
    if data.zero_point is not None and bool(data.zero_point.any()):
        raise CaptureError(f"{name}: INT8 weights with zero points are not supported; quantize them symmetrically")
    options = data.act_quant_kwargs
    inputs: Format | None = None
    given = data.act_quant_scale
    if options is not None:
        if options.mapping_type.name != "SYMMETRIC":
            raise CaptureError(f"{name}: activations with zero points: quantize them symmetrically")
        inputs = INT8 if given is not None else _input(options.granularity, _INT8_INPUTS, name)
    scheme = Scheme(INT8, inputs, kinds == "row", measured=inputs is INT8 and given is None)
    return QuantizedWeight(scheme, data.qdata, scale, input_scale=None if given is None else _scalar(given, name))


def _nvfp4(data: Any, name: str) -> QuantizedWeight:
    """`NVFP4Tensor`: packed codes, swizzled or plain e4m3 scales, perhaps a scale for the tensor."""
    if data.qdata.ndim != 2 or data.qdata.stride(-1) != 1:
        raise CaptureError(f"{name}: NVFP4 weights have to be [N, K / 2], not {tuple(data.qdata.shape)}")
    n, half = data.qdata.shape
    scale = data.scale
    if data.is_swizzled_scales:
        scale = _unswizzled(scale, n, half * 2 // 16)
    global_scale = torch.tensor(1.0) if data.per_tensor_scale is None else _scalar(data.per_tensor_scale, name)
    options = data.act_quant_kwargs
    scheme, input_scale = Scheme(NVFP4), None
    if options is not None:
        scheme = Scheme(NVFP4, NVFP4, measured=options.use_dynamic_per_tensor_scale)
        if not scheme.measured:  # without a scale for the tensor those of the blocks are in units of 1
            given = data.act_per_tensor_scale
            input_scale = torch.tensor(1.0) if given is None else _scalar(given, name)
    return QuantizedWeight(
        scheme, data.qdata.view(torch.uint8), scale.reshape(n, half * 2 // 16), global_scale, input_scale
    )


def _granularity(scale: torch.Tensor, sizes: tuple[int, int], name: str) -> tuple[torch.Tensor, str]:
    """The scale of a weight [N, K] in fp32, and whether it is one for the "tensor", each "row" or each "block"."""
    n, k = sizes
    values = scale.detach().float()
    if values.numel() == 1:
        return values.reshape(()), "tensor"
    if tuple(values.shape) in ((n,), (n, 1)):
        return values.reshape(n, 1), "row"
    if tuple(values.shape) == tuple(FP8_128X128.blocks((n, k))):
        return values, "block"
    raise CaptureError(
        f"{name}: a scale of shape {tuple(values.shape)} for a weight of {n} x {k} is not per tensor, per row or for"
        " 128 x 128 blocks"
    )


def _input(granularity: Any, known: Mapping[str, Format], name: str) -> Format:
    """The format of activations that are quantized at run time with `granularity`."""
    kind = type(granularity).__name__
    sizes = tuple(getattr(granularity, "block_size", ()))
    if kind not in known or (known[kind].sizes and sizes[-1:] != known[kind].sizes) or any(s != 1 for s in sizes[:-1]):
        raise CaptureError(
            f"{name}: activations quantized by {granularity} are not supported; known: {', '.join(known)}"
        )
    return known[kind]


def _scalar(scale: torch.Tensor, name: str) -> torch.Tensor:
    if scale.numel() != 1:
        raise CaptureError(f"{name}: a constant scale of shape {tuple(scale.shape)}, where one number is meant")
    return scale.detach().float().reshape(())


def _unswizzled(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The scales of blocks in the order of the weight, from the order in which tensor cores of NVIDIA read them.

    Rows are padded to 128 and columns to 4; within such a tile the rows r and r + 32 lie side by side (cuBLAS, "1D
    block scaling factors layout").
    """
    tiles = (-(-rows // 128), -(-columns // 4))
    parts = scale.reshape(*tiles, 32, 4, 4).transpose(2, 3).reshape(*tiles, 128, 4)
    return parts.transpose(1, 2).reshape(tiles[0] * 128, tiles[1] * 4)[:rows, :columns].contiguous()


_FP8_INPUTS = {"PerTensor": FP8, "PerRow": FP8_PER_TOKEN, "PerBlock": FP8_1X128}
_INT8_INPUTS = {"PerTensor": INT8, "PerRow": INT8_PER_TOKEN}


_READERS: dict[str, Callable[[Any, str], QuantizedWeight]] = {
    "Float8Tensor": _float8,
    "Int8Tensor": _int8,
    "NVFP4Tensor": _nvfp4,
}
