"""What of other people's tools works with the installed torch: not all of it does with the oldest."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


@functools.cache
def scales_rows_on_cpu() -> bool:
    """Whether torch multiplies FP8 with a scale for each row on a CPU, as torchao's layers want it (2.11 does not)."""
    codes, scales = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scales, scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def annotates_linear(model: Any) -> bool:
    """Whether a pt2e quantizer put quantizers into the graph: torchao's for x86 finds nothing with torch 2.11."""
    return any("quantized_decomposed" in str(node.target) for node in model.graph.nodes)


@functools.cache
def dynamo_traces_modelopt() -> bool:
    """Whether Dynamo, whatever the back end, gets through a layer that modelopt quantized (2.11 does not)."""
    import modelopt.torch.quantization as mtq

    layer, x = nn.Sequential(nn.Linear(16, 16)), torch.ones(1, 16)
    mtq.quantize(layer, mtq.INT8_DEFAULT_CFG, lambda m: m(x))  # type: ignore[attr-defined]
    try:
        torch.compile(layer, backend="eager")(x)
    except Exception:  # of any kind: Dynamo fails inside
        return False
    finally:
        torch._dynamo.reset()
    return True
