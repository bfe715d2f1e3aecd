"""Whether a model is quantized already, by whom, and what then to do instead of quantizing it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from passes.graph import place_of
from passes.ir import ATTENTION, DEQUANTIZE, DYNAMIC_QUANTIZE, QUANTIZE
from passes.subgraphs import all_calls, all_nodes
from qcompile.errors import QCompileError
from qcompile.frontends import modelopt, pt2e, torchao
from qcompile.schemes.layer import QuantizedLinear

__all__ = ["Quantized", "is_finished", "is_quantized", "quantized_by", "refuse_quantized", "refuse_quantized_graph"]

_MODELOPT, _TORCHAO, _PT2E, _OURS = "nvidia-modelopt", "torchao", "pt2e", "qcompile"
_NAMESPACES = {**dict.fromkeys(modelopt.NAMESPACES, _MODELOPT), pt2e.NAMESPACE: _PT2E}
_IR = (QUANTIZE, DEQUANTIZE, DYNAMIC_QUANTIZE, ATTENTION)
# Packages and modules whose layers hold codes, or round floats in their forward, and which nothing here reads.
_LAYERS = (
    "aqlm", "auto_gptq", "awq", "bitsandbytes", "compressed_tensors", "eetq", "fbgemm_gpu", "gptqmodel", "hqq",
    "optimum.quanto", "quanto", "torch.ao.nn.qat", "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.qat",
    "torch.ao.nn.intrinsic.quantized", "torch.ao.quantization", "torchao.quantization.qat", "torchao.quantization.pt2e",
    "transformers.integrations.bitnet", "transformers.integrations.finegrained_fp8",
    "transformers.integrations.fbgemm_fp8", "transformers.integrations.higgs", "vptq",
)  # fmt: skip
_CODES = (torch.int8, torch.uint8)


@dataclass(frozen=True)
class Quantized:
    """What quantized a model.

    Attributes:
        tool: its name.
        place: path of a layer or name of a tensor that shows it.
        readable: whether `import_quantized` takes it.
    """

    tool: str
    place: str
    readable: bool


def quantized_by(model: nn.Module | ExportedProgram) -> Quantized | None:
    """What quantized `model`; None for a model in floating point."""
    if isinstance(model, ExportedProgram):
        return _by_graph(model.graph_module)
    if not isinstance(model, nn.Module):
        return None  # nothing that could be captured, as capture says
    for tool, name in ((modelopt, _MODELOPT), (torchao, _TORCHAO), (pt2e, _PT2E)):
        if tool.is_quantized(model):
            return Quantized(name, _layer_of(model, tool), True)
    found = (_by_module(name, module) for name, module in model.named_modules())
    return next(filter(None, found), None) or _by_tensors(model)


def is_quantized(model: nn.Module | ExportedProgram) -> bool:
    """Whether `model` is something for `import_quantized`: quantized by one of the tools, or by `qcompile.quantize`."""
    found = quantized_by(model)
    return found is not None and found.readable


def is_finished(model: nn.Module | ExportedProgram) -> bool:
    """Whether `model` is a program with the operators of the IR, as `quantize` and `import_quantized` return it."""
    return isinstance(model, ExportedProgram) and any(all_calls(model.graph_module, *_IR))


def refuse_quantized(model: nn.Module | ExportedProgram) -> None:
    """Raises QCompileError if `model` is quantized already: codes would be rounded a second time."""
    if (found := quantized_by(model)) is not None:
        raise QCompileError(_refusal(found))


def refuse_quantized_graph(gm: GraphModule) -> None:
    """Raises QCompileError if a captured graph has operators or tensors of what is quantized already."""
    if (found := _by_graph(gm) or _by_tensors(gm)) is not None:
        raise QCompileError(_refusal(found))


def _refusal(found: Quantized) -> str:
    told = f"this model is quantized already, by {found.tool} ({found.place}): "
    if found.readable:
        return told + (
            "give it to qcompile.import_quantized, or torch.compile without a recipe, or quantize the model that it was"
            " made from"
        )
    return told + (
        "quantize the model that it was made from, in floating point; qcompile.import_quantized reads models of"
        " nvidia-modelopt, torchao, pt2e and qcompile.load_checkpoint"
    )


def _by_graph(gm: GraphModule) -> Quantized | None:
    for node in all_nodes(gm):
        if node.op != "call_function":
            continue
        if node.target in _IR:
            return Quantized(_OURS, place_of(node), True)
        if (tool := _NAMESPACES.get(getattr(node.target, "namespace", ""))) is not None:
            return Quantized(tool, place_of(node), True)
        if "fake_quantize_per" in str(node.target):
            return Quantized(f"fake quantization ({node.target})", place_of(node), False)
    return None


def _by_module(name: str, module: nn.Module) -> Quantized | None:
    place = name or "the model itself"
    if isinstance(module, QuantizedLinear):
        return Quantized(f"{_OURS}.load_checkpoint", place, True)
    if isinstance(module, GraphModule) and (found := _by_graph(module)) is not None:
        return found
    for base in type(module).__mro__:
        if any(f"{base.__module__}.".startswith(f"{prefix}.") for prefix in _LAYERS):
            return Quantized(f"{base.__module__}.{base.__name__}", place, False)
    if getattr(module, "quantization_scheme", None) is not None:  # put on ordinary layers
        return Quantized("compressed-tensors", place, False)
    return None


def _by_tensors(model: nn.Module) -> Quantized | None:
    """Codes among the tensors of `model`: anything in FP8 or FP4, and parameters of small integers."""
    for name, tensor in _tensors(model):
        small = tensor.dtype in _CODES and isinstance(tensor, nn.Parameter)
        if small or str(tensor.dtype).startswith(("torch.float8", "torch.float4")):
            return Quantized(f"another tool, which left {tensor.dtype}", name, False)
    return None


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _layer_of(model: nn.Module, tool: object) -> str:
    """A layer that shows that `tool` worked on `model`."""
    if tool is torchao:
        return next(name for name, p in model.named_parameters() if torchao.is_subclass(p))
    if tool is modelopt:
        return modelopt.first_quantizer(model) or ""
    assert isinstance(model, GraphModule)
    found = _by_graph(model)
    return found.place if found is not None else "its graph"
