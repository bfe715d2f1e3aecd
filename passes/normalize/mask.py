"""Attention masks: drop those that hide nothing, name those that are causal, simplify the rest."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.base import Pass
from passes.graph import calls, shape
from passes.normalize.mask_simplifier import SimplerMasks
from passes.normalize.size_functions import NotEvaluable
from passes.sdpa import SDPA, Attention

__all__ = ["NormalizeAttentionMask"]


_KEPT = {
    "causal": "the mask stays a tensor: it is causal, but queries and keys are not known to be equally many",
    "pattern": "the mask stays a tensor: of sizes only, and neither all true nor causal (a sliding window, say)",
    "bias": "the mask stays a tensor: it is an additive bias that does not depend on the input",
}


class NormalizeAttentionMask(Pass):
    """Say in the arguments of an attention what its mask computes.

    Before:
        sdpa(q, k, v, expand(and(arange <= arange.T, ones)))                    # Hugging Face, causal
        sdpa(q, k, v, expand(and(arange >= 0, index(padding, aranges))))        # Hugging Face, padding
        sdpa(q, k, v, where(mask, 0.0, finfo.min))                              # additive
    After:
        sdpa(q, k, v, None, is_causal=True)
        sdpa(q, k, v, unsqueeze(unsqueeze(padding)))
        sdpa(q, k, v, mask)

    A mask that depends on no input's values is computed (`SizeFunctions`): at its size if that is static, else at sizes
    chosen around every number that it is computed with.

    Requires: the symbols' ranges in the shape environment of the graph's fake values.
    Ensures: the same attention for every query that may see a key. (Where a query sees none, an additive finfo.min
        gives the mean of all values and a boolean mask gives zeros; `ZeroMaskedRows` makes it zeros.)
    Declines when: a mask of sizes only is neither all true nor causal (a sliding window), or too large to compute.
    Why: an always-true mask costs eight kernels, and a causal mask as a tensor keeps attention from skipping half of
        its work; builders fuse attention with boolean masks that broadcast.
    """

    def rewrite(self, gm: GraphModule) -> None:
        masks = SimplerMasks(gm)
        for node in calls(gm.graph, SDPA):
            attention = Attention.of(node)
            mask = attention.mask
            if mask is None or attention.is_causal:
                continue
            simpler = replace(attention, mask=masks.simplest(mask))
            if simpler.mask is not None and masks.functions.is_size_function(simpler.mask):
                square = _is_square(simpler.mask, attention)
                try:
                    kind = masks.kind(simpler.mask)
                except NotEvaluable as error:
                    self.decline(f"cannot tell what the mask is: {error}", node, mask)
                    kind = "unknown"
                if kind == "true":
                    simpler = replace(attention, mask=None)
                elif kind == "causal" and square:
                    simpler = replace(attention, mask=None, is_causal=True)
                elif kind in _KEPT:
                    self.decline(_KEPT[kind], node, mask)
            if simpler != attention:
                simpler.replace(node)
                self.fire()


def _is_square(mask: Node, attention: Attention) -> bool:
    """Whether queries and keys are equally many, and `mask` has a row and a column for each."""
    queries, keys = shape(attention.q)[-2], shape(attention.k)[-2]
    sizes = (keys, *shape(mask)[-2:])
    return len(sizes) == 3 and all(statically_known_true(queries == size) for size in sizes)
