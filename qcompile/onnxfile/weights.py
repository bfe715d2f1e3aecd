"""The files beside an ONNX file that hold its weights."""

from __future__ import annotations

import onnx
from onnx import external_data_helper


def weight_files(model: onnx.ModelProto) -> set[str]:
    """Their locations, relative to the directory of the ONNX file."""
    tensors = [tensor for tensor in model.graph.initializer if external_data_helper.uses_external_data(tensor)]
    return {external_data_helper.ExternalDataInfo(tensor).location for tensor in tensors} - {""}
