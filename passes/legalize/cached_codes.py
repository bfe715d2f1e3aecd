"""Codes are appended to a cache as numbers, for readers whose Concat takes no codes."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.graph import Emitter, calls, dtype, is_call
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.state import UPDATES, new_of, past_of, updated

__all__ = ["AppendInFloat"]


class AppendInFloat(Pass):
    """Append to a cache of codes in floating point, and quantize what comes of it.

    Before:
        all = cat([past, quantize(new, s)], axis)       # past is codes
    After:
        all = quantize(cat([dequantize(past, s), new], axis), s)
    The same for codes that are written over codes: `index_copy(past, axis, positions, quantize(new, s))`.

    Requires: `StoreCaches` wrote it.
    Ensures: the same codes: a code that is dequantized and quantized again is what it was, as long as its value is a
        number of the compute dtype.
    Declines when: never; other concatenations and writes stay.
    Why: Concat of ONNX has no FP8 before opset 25, and TensorRT makes of this form the kernel that reads and writes
        codes alone: in decode it dequantizes, appends, quantizes and attends in one.
    """

    def __init__(self, formats: Collection[str] | None = None) -> None:
        """`formats` are those of the codes; None for all."""
        super().__init__()
        self.formats = formats

    def rewrite(self, gm: GraphModule) -> None:
        for node in calls(gm.graph, *UPDATES):
            new = _appended(node)
            if not new or (self.formats is not None and new[0].kwargs["format"] not in self.formats):
                continue
            emit, like = Emitter(node), new[0]
            scale, fmt = like.args[1], like.kwargs["format"]
            sources = [part.args[0] for part in new]
            compute = dtype(sources[0])  # type: ignore[arg-type]
            past = emit(DEQUANTIZE, past_of(node), scale, format=fmt, dtype=compute)
            target, args = updated(node, past, sources)  # type: ignore[arg-type]
            whole = emit(target, *args, **node.kwargs)
            node.replace_all_uses_with(emit(QUANTIZE, whole, scale, format=fmt))
            self.fire()


def _appended(node: Node) -> tuple[Node, ...]:
    """What `node` adds to a cache of codes: calls of quantize with one scale; nothing where it is none."""
    if past_of(node) is None or past_of(node) not in node.all_input_nodes:
        return ()
    new = new_of(node)
    return new if all(is_call(part, QUANTIZE) and part.args[1:] == new[0].args[1:] for part in new) else ()
