"""A session of ONNX Runtime for a decoder: the fastest level of optimization that gives right numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompile.generation.decoder_file import DecoderFile
from qcompile.onnx.session import import_onnxruntime, onnx_session

__all__ = ["decoder_session", "session_entries"]


def decoder_session(file: DecoderFile, providers: Sequence[Any], sess_options: Any = None) -> Any:
    """`sess_options` are the caller's, or None."""
    if sess_options is None and not file.dequantizes:  # nothing that a fusion of Q/DQ could spoil
        sess_options = import_onnxruntime().SessionOptions()
    return onnx_session(file.path, providers=providers, sess_options=sess_options)


def session_entries(file: DecoderFile) -> dict[str, str]:
    """The same as configuration, for who opens the file without this package."""
    if not file.dequantizes:
        return {}
    return {"graph_optimization_level": "ORT_ENABLE_BASIC", "session.disable_quant_qdq": "1"}
