"""ONNX Runtime sessions with the options that FP8 files need."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.errors import QCompileError

if TYPE_CHECKING:
    import onnxruntime

# ONNX Runtime's Q/DQ fusions assume 8-bit integers: on FP8 they make MatMulIntegerToFloat nodes that fail to load.
_REQUIRED = {"session.disable_quant_qdq": "1"}
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def import_onnxruntime() -> Any:
    """The onnxruntime module. Raises QCompileError that says how to get it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise QCompileError(
            "ONNX Runtime is not installed, so that the file cannot be run: pip install 'qcompile[onnxruntime]'"
        ) from error
    return onnxruntime


def onnx_session(
    path: str | os.PathLike[str] | bytes,
    *,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    sess_options: onnxruntime.SessionOptions | None = None,
    external_data_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> onnxruntime.InferenceSession:
    """Open `path` (or a serialized model) in ONNX Runtime, on the CPU unless `providers` says otherwise.

    `sess_options` gets what FP8 needs in addition to what the caller set; without it, optimization is "basic".
    `external_data_dir` is where a serialized model's external data lies; a path finds its own. Other keywords go to
    `onnxruntime.InferenceSession`.

    Raises: QCompileError if ONNX Runtime or the file is missing; ONNX Runtime's own errors for what it cannot run.
    """
    ort = import_onnxruntime()
    options = sess_options
    if options is None:
        options = ort.SessionOptions()
        # Its extended fusions give wrong numbers for some files (a plain nn.TransformerEncoder: 40 % off), or crash.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for key, value in _REQUIRED.items():
        options.add_session_config_entry(key, value)
    if external_data_dir is not None:
        options.add_session_config_entry(_EXTERNAL_FOLDER, os.fspath(external_data_dir))
    if not isinstance(path, bytes):
        if not Path(path).is_file():
            raise QCompileError(f"no ONNX file at '{os.fspath(path)}'")
        path = os.fspath(path)
    return ort.InferenceSession(path, sess_options=options, providers=list(providers), **kwargs)
