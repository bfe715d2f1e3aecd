"""Quantized attention that TensorRT has no fused kernel for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.base import Pass
from passes.capabilities import FUSED_ATTENTION
from passes.constants import LAYOUT
from passes.graph import Emitter, bounds, calls, dtype, is_call, shape, val
from passes.ir import ATTENTION, QUANTIZE
from passes.legalize.attention import quantize_of
from passes.sdpa import Attention

__all__ = ["LeaveUnfusedAttention"]


class LeaveUnfusedAttention(Pass):
    """Take the quantizers from an attention that would not be fused.

    Before:
        y = qcompile.attention(dequantize(quantize(q)), dequantize(quantize(k)), dequantize(quantize(v)), mask, s)
    After:
        y = sdpa(q, k, v, mask, scale=1.0)

    Requires: `FuseAttentionQdq` made the node.
    Ensures: the attention is computed from the values before their quantizers, which other users keep. Each is listed
        as declined, with what no kernel takes.
    Declines when: nothing; with lengths that inputs decide, and that may or may not fuse, the attention stays and a
        notice says what profiles need.
    Why: quantized and not fused, it is 11 to 15 kernels with its three linears in place of 4 to 6 in half precision.
    """

    def rewrite(self, gm: GraphModule) -> None:
        depends: Counter[str] = Counter()
        for node in calls(gm.graph, ATTENTION):
            reason = _never(node)
            if reason is not None:
                self.decline(f"not quantized for TensorRT: {reason}", node)
                _unquantize(node)
                self.fire()
            elif (reason := _sometimes(node)) is not None:
                depends[reason] += 1
        for reason, count in depends.items():
            self.notice(f"{count} attentions are fused or not by the lengths of the profile: {reason}")


def _never(node: Node) -> str | None:
    """Why no input of the program lets `node` be fused; None if one does."""
    fmt = str(node.kwargs["format"])
    kernel = FUSED_ATTENTION.get(fmt)
    if kernel is None:
        return f"there is no fused attention in {fmt}"
    query = node.args[0]
    assert isinstance(query, Node)
    width = shape(query)[-1]
    if unfit := kernel.unfit_width(width if isinstance(width, int) else None):
        return unfit
    if shape(query)[:2] == (1, 1):
        return "it is one head of one sample, which TensorRT fuses in no precision"
    if all(map(_lies_across, node.args[:2])):
        return "it attends to channels: in memory its heads lie inside of what the products add over"
    computes = str(dtype(node)).removeprefix("torch.")
    if computes in kernel.reader and not _read_quantized(node, fmt):
        return f"in a {computes} program the next reader of its output has to be a quantizer of the same format"
    unfit_lengths = [kernel.unfit_length(queries, keys) for queries, keys in _lengths(node)]
    return unfit_lengths[0] if all(unfit_lengths) else None


def _sometimes(node: Node) -> str | None:
    """What lengths that inputs decide have to be for `node` to be fused; None where none of them is in the way."""
    kernel = FUSED_ATTENTION[str(node.kwargs["format"])]
    return next((unfit for lengths in _lengths(node) if (unfit := kernel.unfit_length(*lengths))), None)


def _lengths(node: Node) -> Iterator[tuple[float, float]]:
    """(queries, keys) of `node`, the fewest and the most that inputs can give it."""
    ranges = [bounds(shape(operand)[2]) for operand in node.args[:2]]  # type: ignore[arg-type]  # both are nodes
    yield from zip(*ranges, strict=True)


def _lies_across(operand: object) -> bool:
    """Whether in memory the sequence of `operand` [B,H,S,D] is innermost, then come the heads, and then its rows."""
    source = quantize_of(operand).args[0]
    assert isinstance(source, Node)
    _, heads, sequence, row = val(source).stride()
    return sequence == 1 and shape(source)[1] != 1 and bool(statically_known_true(row > heads))


def _read_quantized(node: Node, fmt: str) -> bool:
    """Whether a quantizer of `fmt`, behind nothing but rearrangements, is all that reads `node`."""
    return bool(node.users) and all(
        (is_call(user, QUANTIZE) and user.kwargs["format"] == fmt)
        or (is_call(user, *LAYOUT) and _read_quantized(user, fmt))
        for user in node.users
    )


def _unquantize(node: Node) -> None:
    query, key, value, mask, _ = node.args
    query, key, value = (quantize_of(operand).args[0] for operand in (query, key, value))
    assert isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)
    assert mask is None or isinstance(mask, Node)
    grouped, causal = shape(query)[1] != shape(key)[1], bool(node.kwargs["is_causal"])
    plain = Attention(query, key, value, mask, 0.0, causal, 1.0, grouped).emit(Emitter(node))
    node.replace_all_uses_with(plain)
