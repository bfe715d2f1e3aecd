"""What the fused attention kernels of TensorRT take.

An attention that is quantized beyond that runs as two products and a softmax with quantizers between them: more kernels
than in half precision, where one kernel does it all. With one query that kernel reads half precision in any case.
Observed with the builder of TensorRT-RTX 1.7.1, alike for SM89 and SM120, with a scale for each of q, k, v and the
probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

__all__ = ["FUSED_ATTENTION", "FusedAttention"]


@dataclass(frozen=True)
class FusedAttention:
    """What TensorRT's fused attention takes in one format.

    Attributes:
        name: of the format, in a sentence.
        least_queries, least_keys, most_keys: the lengths.
        widths: of a head; other keys and values than these it does not take.
        reader: the dtypes of the program in which the next reader of the output has to be a quantizer of this format.
    """

    name: str
    least_queries: int
    least_keys: int
    most_keys: float
    widths: Collection[int]
    reader: Collection[torch.dtype]

    def unfit_width(self, width: int | None) -> str | None:
        """Why heads of `width` have no kernel; None for one that has, or that is not known."""
        if width is None or width in self.widths:
            return None
        known = f"at most {max(self.widths)}" if isinstance(self.widths, range) else ", ".join(map(str, self.widths))
        return f"head dimension {width}, and fused {self.name} attention takes {known}"

    def unfit_length(self, queries: float | None, keys: float | None) -> str | None:
        """Why `queries` and `keys` of that number have no kernel; None if they have, or are not known."""
        fused = f"fused {self.name} attention"
        if keys is not None and keys < self.least_keys:
            return f"its key sequence can be as short as {keys}, and {fused} needs at least {self.least_keys}"
        if keys is not None and keys > self.most_keys:
            longest = f"as long as {keys}" if keys < math.inf else "of any length"
            return f"its key sequence can be {longest}, and {fused} takes at most {self.most_keys}"
        if queries is not None and queries < self.least_queries:
            return f"it can have {queries} query, and {fused} needs at least {self.least_queries}"
        return None


FUSED_ATTENTION: Mapping[str, FusedAttention] = {
    "fp8": FusedAttention("FP8", 2, 32, math.inf, range(1, 257), (torch.float32,)),
    "int8": FusedAttention("INT8", 2, 1, 512, (16, 32, 64), (torch.float16, torch.bfloat16, torch.float32)),
}
"""Format -> what is fused in it; others are not."""
