"""What the chosen forms cost in the tools that run them, as notices of the report."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import PassLog
from passes.formats import FP8_1X128, INT4_COLUMNS, INT8
from passes.graph import dtype, is_call, module_path, shape
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.legalize.block_to_channel import BlocksToPerChannel
from passes.legalize.k_split import K_SPLIT
from passes.legalize.measured_scales import MeasuredToConstant
from passes.subgraphs import all_calls, all_nodes


def cost_notices(gm: GraphModule, log: PassLog) -> list[str]:
    """One sentence for each form that `gm`, lowered with `log`, has.

    The sizes are those of the example inputs; a dynamic one counts as it was there, or as 1 if that is not known.
    """
    return [
        *_of_products(gm),
        *_of_weights(gm),
        *_of_channels(log),
        *_of_measured_scales(log),
        *_of_integers(gm),
        *_of_int4(gm),
    ]


def _of_products(gm: GraphModule) -> list[str]:
    products = [node for node in all_nodes(gm) if K_SPLIT in node.meta]
    if not products:
        return []
    largest = max(products, key=_bytes)
    return [
        f"FP8 in 128 x 128 blocks: {_count(len(products), 'GEMM')} as K-split products, which write an intermediate"
        f" of K/128 x M x N (largest {_shown(_bytes(largest))} at the example shapes,"
        f" {module_path(largest) or 'the model'}); block_fp8='per_channel' avoids it, for the accuracy of one scale for"
        " each channel"
    ]


def _of_weights(gm: GraphModule) -> list[str]:
    weights = [n for n in all_nodes(gm) if is_call(n, DEQUANTIZE) and n.kwargs["format"] == FP8_1X128.name]
    if not weights:
        return []
    return [
        f"FP8 in 128 x 128 blocks: {_count(len(weights), 'weight')} with an input that is not quantized; TensorRT"
        f" writes each in {str(dtype(weights[0])).removeprefix('torch.')} at every run (largest"
        f" {_shown(max(map(_bytes, weights)))}), and multiplies in that"
    ]


def _of_channels(log: PassLog) -> list[str]:
    count = log.fired[BlocksToPerChannel.__name__]
    if not count:
        return []
    return [
        f"FP8 in 128 x 128 blocks: {_count(count, 'layer')} quantized once more, with one scale for each channel of the"
        " weight: one GEMM each, which is no longer what the program computes"
    ]


def _of_measured_scales(log: PassLog) -> list[str]:
    count = log.fired[MeasuredToConstant.__name__]
    if not count:
        return []
    return [
        f"scales measured at run time, per token or tensor: {_count(count, 'tensor')}; TensorRT has about one kernel"
        " more for each GEMM that reads one than with scales from calibration"
    ]


def _of_integers(gm: GraphModule) -> list[str]:
    formats = {node.kwargs["format"] for node in all_calls(gm, QUANTIZE)}
    if INT8.name not in formats:
        return []
    return [
        "INT8 in ONNX Runtime on an x86 CPU without VNNI: sums of products saturate at 16 bits, and results can be off"
        " by 10 to 30 %, unless the session option session.x64quantprecision is 1; qcompile.onnx_session is exact"
    ]


def _of_int4(gm: GraphModule) -> list[str]:
    names = {fmt.name for fmt in INT4_COLUMNS.values()}
    weights = [node for node in all_calls(gm, DEQUANTIZE) if node.kwargs["format"] in names]
    if not weights:
        return []
    found = [
        "INT4 in ONNX Runtime: a session with default options multiplies by MatMulNBits and rounds the activations to 8"
        " bits, unless the session option session.qdq_matmulnbits_accuracy_level is 1; qcompile.onnx_session is exact"
    ]
    if odd := [node for node in weights if int(shape(node)[-1]) % 2]:
        found.append(
            f"INT4: {_count(len(odd), 'weight')} with an odd number of outputs, which TensorRT dequantizes at every run"
            f" ({module_path(odd[0]) or 'the model'})"
        )
    if experts := [node for node in weights if len(shape(node)) > 2]:
        found.append(
            f"INT4: {_count(len(experts), 'weight')} of all experts of a mixture, which are dequantized at every run"
            f" (largest {_shown(max(map(_bytes, experts)))}), and multiplied in {_name(experts[0])}"
        )
    return found


def _name(node: Node) -> str:
    return str(dtype(node)).removeprefix("torch.")


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s'[: count > 1]}"


def _bytes(node: Node) -> int:
    size = dtype(node).itemsize
    for length in shape(node):
        size *= _known(length)
    return size


def _known(length: int | torch.SymInt) -> int:
    """A size at the example shapes."""
    if isinstance(length, int):
        return length
    hint = length.node.hint
    return int(hint) if hint is not None else 1


def _shown(count: int) -> str:
    return f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count / 1e3:.3g} kB"
