"""FP8 in blocks of 128 for tests: graphs that have it, and an oracle in numpy that knows nothing of `passes`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.fold.weights import FoldWeights
from passes.formats import FP8_1X128, FP8_128X128
from passes.quantize.insert import InsertQdq, Quantizer
from passes.quantize.sites import find_sites
from passes.testing import graph_of

Array = npt.NDArray[Any]
WEIGHT, INPUT = Quantizer(FP8_128X128, None), Quantizer(FP8_1X128, None)


def block_graph(
    module: nn.Module,
    *inputs: Tensor,
    weight: Quantizer | None = WEIGHT,
    activation: Quantizer | None = INPUT,
    **options: Any,
) -> GraphModule:
    """`module` with weights in blocks of 128 x 128, as codes, and inputs in blocks of 1 x 128."""
    gm = graph_of(module, *inputs, **options)
    wanted = {"weight": weight, "input": activation}
    chosen = {site: wanted.get(site.operand) for site in find_sites(gm)}
    InsertQdq({site: quantizer for site, quantizer in chosen.items() if quantizer is not None})(gm)
    FoldWeights()(gm)
    return gm


def in_blocks(x: Array, rows: int) -> Array:
    """`[..., N, K]` -> what FP8 makes of it with a scale for each block of `rows` x 128: float64."""
    result = np.zeros(x.shape)
    for start in range(0, x.shape[-2], rows):
        for left in range(0, x.shape[-1], 128):
            at = (..., slice(start, start + rows), slice(left, left + 128))
            block = x[at].astype(np.float32)
            scale = np.abs(block).max(axis=(-2, -1), keepdims=True).astype(np.float32) / np.float32(448)
            scale = np.where(scale > 0, scale, np.float32(1))
            codes = np.clip(block / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            result[at] = codes.astype(np.float64) * scale.astype(np.float64)
    return result


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Array:
    """The linear layer in float64, of inputs in blocks of 1 x 128 and weights in blocks of 128 x 128."""
    rows, matrix = (t.detach().float().numpy() for t in (x, weight))
    result: Array = in_blocks(rows, 1) @ np.swapaxes(in_blocks(matrix, 128), -1, -2)
    return result if bias is None else result + bias.detach().double().numpy()


def error(got: Tensor | Array, want: Array) -> float:
    """Relative error of the whole, by norms."""
    values = got.double().numpy() if isinstance(got, torch.Tensor) else got.astype(np.float64)
    return float(np.linalg.norm(values - want) / np.linalg.norm(want))
