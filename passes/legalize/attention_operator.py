"""Which quantized attentions TensorRT's own operator is the better form of: the others are matrix products."""

from __future__ import annotations

from torch.fx import Node

from passes.formats import FP8
from passes.graph import bounds, calls, is_call, shape
from passes.ir import ATTENTION, DEQUANTIZE, QUANTIZE
from passes.state import is_returned

__all__ = ["has_operator", "is_long_causal", "reads_cache"]

SHORT = 512
"""Keys up to which a causal attention is products with a mask for TensorRT: see `is_long_causal`."""


def has_operator(node: Node) -> bool:
    """Whether an attention is the operator for TensorRT. A file has one body for it, so a graph has one of the forms:
    where a causal one without a mask is among them, those that read a cache are products."""
    if is_long_causal(node):
        return True
    return reads_cache(node) and not any(is_long_causal(other) for other in calls(node.graph, ATTENTION))


def is_long_causal(node: Node) -> bool:
    """Whether TensorRT's own operator is the better form: it knows the causal mask, of which products read a number for
    each query and key.

    It writes half precision, so that a kernel quantizes behind it. Up to 512 keys that costs more than the products
    that it leaves out: both grow with the heads, so the length alone decides. It takes FP8 only, and values of the
    width of the keys (multi-head latent attention has narrower ones).
    """
    key = node.args[1]
    assert isinstance(key, Node)
    plain = bool(node.kwargs["is_causal"]) and node.args[3] is None
    return plain and _fits(node) and bounds(shape(key)[2])[1] > SHORT


def reads_cache(node: Node) -> bool:
    """Whether keys and values are the codes of a cache that new ones were put into, and that the program gives back.

    The operator reads these codes as they are. For products the kernel that appends writes keys and values a second
    time, keys transposed and both repeated for every query head: with four of these to a key head that is ten bytes of
    traffic for a byte of the cache in place of three. The operator costs one kernel more, which quantizes its output.
    """
    masked = node.args[3] is not None and not node.kwargs["is_causal"]
    return masked and _fits(node) and all(_is_cache(operand) for operand in node.args[1:3])


def _fits(node: Node) -> bool:
    key, value = node.args[1:3]
    assert isinstance(key, Node) and isinstance(value, Node)
    return node.kwargs["format"] == FP8.name and shape(key)[-1] == shape(value)[-1]


def _is_cache(operand: object) -> bool:
    """Whether `operand` is `dequantize(quantize(cat([dequantize(past), new])))`, or of a `where` in the place of `cat`,
    past an input, and the codes are given back."""
    if not isinstance(operand, Node) or not is_call(operand, DEQUANTIZE):
        return False
    codes = operand.args[0]
    if not isinstance(codes, Node) or not is_call(codes, QUANTIZE) or not is_returned(codes):
        return False
    parts = codes.args[0].all_input_nodes if isinstance(codes.args[0], Node) else []
    return any(is_call(part, DEQUANTIZE) and part.all_input_nodes[0].op == "placeholder" for part in parts)
