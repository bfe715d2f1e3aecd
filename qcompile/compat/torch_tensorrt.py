"""Private names of Torch-TensorRT, whose import takes a GPU; none is looked up before it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from passes.private import Private

_ROUTE = 'build_engine(route="torch_tensorrt")'
_CONVERSION = "torch_tensorrt.dynamo.conversion"


def dtype_of(dtype: Any) -> Any:
    """A dtype of torch, or of TensorRT, as Torch-TensorRT has it, which turns it into others."""
    from torch_tensorrt import _enums

    return _enums.dtype._from(dtype)


def output_dtypes(gm: Any) -> Sequence[Any]:
    """The dtypes of the results of a graph, doubles as floats."""
    from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes

    found: Sequence[Any] = infer_module_output_dtypes(gm, truncate_double=True)
    return found


def construct(interpreter: Any) -> None:
    """Have a `TRTInterpreter` add the layers of its graph to its network, and build nothing."""
    interpreter._construct_trt_network_def()


NAMES = (
    Private("torch_tensorrt._enums", "dtype._from", _ROUTE, callable),
    Private(f"{_CONVERSION}._conversion", "infer_module_output_dtypes", _ROUTE, callable),
    Private(_CONVERSION, "TRTInterpreter._construct_trt_network_def", _ROUTE, callable),
)


def probes() -> Iterator[Private]:
    """Every private name that this module knows; none without a GPU, for want of which the package does not load."""
    import torch

    if torch.cuda.is_available():
        yield from NAMES
