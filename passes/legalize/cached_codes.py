"""Codes are appended to a cache as numbers, for readers whose Concat takes no codes."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, aten, calls, dtype, is_call
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.state import past_of

__all__ = ["AppendInFloat"]


class AppendInFloat(Pass):
    """Append to a cache of codes in floating point, and quantize what comes of it.

    Before:
        all = cat([past, quantize(new, s)], axis)       # past is codes
    After:
        all = quantize(cat([dequantize(past, s), new], axis), s)

    Requires: `StoreCaches` wrote it.
    Ensures: the same codes: a code that is dequantized and quantized again is what it was, as long as its value is a
        number of the compute dtype.
    Declines when: never; other concatenations stay.
    Why: Concat of ONNX has no FP8 before opset 25, and TensorRT makes of this form the kernel that reads and writes
        codes alone: in decode it dequantizes, appends, quantizes and attends in one.
    """

    def __init__(self, formats: Collection[str] | None = None) -> None:
        """`formats` are those of the codes; None for all."""
        super().__init__()
        self.formats = formats

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, aten.cat.default):
            new = _appended(node)
            if not new or (self.formats is not None and new[0].kwargs["format"] not in self.formats):
                continue
            emit, like = Emitter(node), new[0]
            scale, fmt = like.args[1], like.kwargs["format"]
            sources = [part.args[0] for part in new]
            compute = dtype(sources[0])  # type: ignore[arg-type]
            past = emit(DEQUANTIZE, node.args[0][0], scale, format=fmt, dtype=compute)  # type: ignore[index]
            whole = emit(aten.cat.default, [past, *sources], *node.args[1:])
            node.replace_all_uses_with(emit(QUANTIZE, whole, scale, format=fmt))
            self.fire()


def _appended(node: Node) -> list[Node]:
    """What `node` appends to a cache of codes: calls of quantize with one scale; nothing where it is none."""
    new = list(node.args[0][1:])  # type: ignore[index,arg-type]
    alike = all(is_call(part, QUANTIZE) and part.args[1:] == new[0].args[1:] for part in new)
    return new if alike and past_of(node) is node.args[0][0] else []  # type: ignore[index]
