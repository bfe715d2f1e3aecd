"""Caches of keys and values as they are stored: codes, or numbers of the type that is computed in."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from passes.base import Pass
from passes.formats import get_format
from passes.graph import Emitter, aten, dtype, is_call, val
from passes.ir import DEQUANTIZE, QUANTIZE
from passes.state import State, states, updated

__all__ = ["StoreCaches"]


class StoreCaches(Pass):
    """Take and give caches as what they are computed with: codes where they are quantized, else the compute dtype.

    Before:
        all = cat([_to_copy(past, float16), new], axis)
        read = dequantize(quantize(all, s), s)
        return ..., _to_copy(read, float32)
    After:
        all = cat([past, quantize(new, s)], axis)      # past is codes
        read = dequantize(all, s)
        return ..., all
    Without a quantizer:
        all = cat([past, new], axis)                   # past is float16
        return ..., all
    The same for a cache that is written into, `index_copy(past, axis, positions, new)`.

    Requires: `InsertQdq` and `FuseAttentionQdq` ran, which look for a quantize in front of an attention.
    Ensures: only what is new is quantized, and an input and an output of the program are a cache of codes: what is
        given back is what the next call takes. The codes of before, dequantized and quantized again with the same
        scale, are what they were, so the values are those of the graph before.
    Declines when: the input is read by something else than the cache.
    Why: a cache in float32 is four times the memory and traffic of one in FP8, and quantizing all of it again for each
        token reads it once more.
    """

    keeps_dtypes = False

    def __init__(self, *, shared: bool = False) -> None:
        """`shared`: an attention's quantizer of keys or values is that of their cache, too, as in checkpoints."""
        super().__init__()
        self.shared = shared

    def rewrite(self, gm: GraphModule) -> None:
        for state in list(states(gm.graph)):
            if (reason := self._reason(state)) is not None:
                self.decline(reason, state.update)
            elif self._store(gm, state):
                self.fire()

    def _reason(self, state: State) -> str | None:
        """Why `state` stays as it is, or None."""
        readers = [user for user in state.past.users if isinstance(user.meta.get("val"), torch.Tensor)]
        casts = [user for user in readers if is_call(user, aten._to_copy.default)]
        rest = [user for user in (*readers, *(u for cast in casts for u in cast.users)) if user not in casts]
        if any(user is not state.update for user in rest):
            return "the cache that is given is read by something else than what appends to it"
        return None

    def _store(self, gm: GraphModule, state: State) -> bool:
        quantize, update, output = self._quantize(state), state.update, gm.graph.output_node()
        stored = get_format(str(quantize.kwargs["format"])).storage if quantize is not None else dtype(update)
        if dtype(state.past) is stored and quantize is None:
            return False
        state.past.meta["val"] = val(state.past).to(stored)
        kept = update
        if quantize is not None:
            emit = Emitter(quantize, like=update)
            new = [emit(QUANTIZE, part, *quantize.args[1:], **quantize.kwargs) for part in state.new]
            target, args = updated(update, state.past, new)
            kept = emit(target, *args, **update.kwargs)
            quantize.replace_all_uses_with(kept)
            update.replace_all_uses_with(kept, delete_user_cb=lambda user: user.op == "output")
        else:
            update.target, update.args = updated(update, state.past, state.new)
        results = list(output.args[0])  # type: ignore[arg-type]
        results[state.index] = kept
        output.args = (tuple(results),)
        return True

    def _quantize(self, state: State) -> Node | None:
        """The quantize of all that `state` gives back, with one constant scale; None where it is not quantized."""
        found, *others = sorted(state.update.users, key=lambda user: not is_call(user, QUANTIZE))
        if not is_call(found, QUANTIZE) or not any(is_call(user, DEQUANTIZE) for user in found.users):
            return None
        return found if not others or (self.shared and all(map(_is_given_back, others))) else None


def _is_given_back(user: Node) -> bool:
    """Whether `user` is the output of the graph, or makes the type that this has and nothing else reads."""
    return user.op == "output" or (is_call(user, aten._to_copy.default) and all(u.op == "output" for u in user.users))
