"""ONNX Runtime sessions with the options that files with Q/DQ need."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir

from qcompile.errors import QCompileError, VerificationError
from qcompile.onnx.names import describe
from qcompile.onnx.relu import dropped_relus
from qcompile.onnx.view import ModelView
from qcompile.onnxfile.names import said
from qcompile.onnxfile.read import OnnxFile, external_files, parse_onnx, read_onnx, rebase

if TYPE_CHECKING:
    import onnxruntime

logger = logging.getLogger("qcompile")

# Above "basic", ONNX Runtime's Q/DQ fusions make nodes that fail to load, of FP8 without a bias up to 1.31 and of INT8
# with one from 1.31 on, and round what the file leaves in float (MatMulNBits), or saturate (INT8 on CPUs without VNNI).
_REQUIRED = {"session.disable_quant_qdq": "1"}
# Where weights alone are quantized, MatMulNBits reads them as they are: at this level it rounds no activation.
_WEIGHT_ONLY = {"session.disable_quant_qdq": "0", "session.qdq_matmulnbits_accuracy_level": "1"}
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

    `sess_options` gets what Q/DQ need in addition to what the caller set; without it, optimization is "basic".
    A level above that, ONNX Runtime's own default is one, is kept where it gives right numbers. For a file that it
    gives wrong ones for (a Relu in front of an FP8 Q, as other tools write it) this session, also after
    `set_providers`, is opened at "basic", with a warning of the logger `qcompile`; `sess_options` has the caller's
    level again afterwards. A file that quantizes weights alone (INT4) multiplies by them as they are stored from
    "extended" on, and exactly: ONNX Runtime's own default rounds the activations to 8 bits.
    `external_data_dir` is where a serialized model's external data lies; a path finds its own. Other keywords go to
    `onnxruntime.InferenceSession`.

    Raises: QCompileError if ONNX Runtime or the file is missing, the file is damaged, or ONNX Runtime cannot run it.
    """
    import_onnxruntime()
    if isinstance(path, bytes):
        name = "the serialized model"
        parse_onnx(path)
    else:
        name, file = f"'{os.fspath(path)}'", read_onnx(path)
        if problems := file.problems():
            raise VerificationError(f"{name} is incomplete: {problems[0]}")
        path, external_data_dir = _openable(file, external_data_dir)
    try:
        return open_session(path, providers, sess_options, external_data_dir, **kwargs)
    except _errors() as error:
        raise QCompileError(f"ONNX Runtime cannot open {name}: {said(error)}") from error


def _openable(file: OnnxFile, folder: str | os.PathLike[str] | None) -> tuple[Path | bytes, Any]:
    """`file`, and the folder of its data, as every release of ONNX Runtime takes them: without links, as those of a
    snapshot of the hub's cache, which lead out of the folder."""
    home, data = file.path.parent.resolve(), external_files(file.model, file.path)
    if not data or (not file.path.is_symlink() and all(part.is_relative_to(home) for part in data)):
        return file.path, folder
    model = onnx.ModelProto()
    model.ParseFromString(file.path.read_bytes())
    folder = rebase(model, file.path)
    return model.SerializeToString(), folder


def open_session(
    path: str | os.PathLike[str] | bytes,
    providers: Sequence[Any] = ("CPUExecutionProvider",),
    sess_options: onnxruntime.SessionOptions | None = None,
    external_data_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> onnxruntime.InferenceSession:
    """`onnx_session` of what is known to be sound, with ONNX Runtime's own errors for what it cannot run."""
    ort = import_onnxruntime()
    basic = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options = sess_options
    if options is None:
        options = ort.SessionOptions()
        # Its extended fusions give wrong numbers for some files (a plain nn.TransformerEncoder: 40 % off), or crash.
        options.graph_optimization_level = basic
    reason, required = None, _REQUIRED
    if _above_basic(options):
        view = ModelView(parse_onnx(path) if isinstance(path, bytes) else path)
        reason = _why_basic(view)
        required = _REQUIRED if view.of_type("QuantizeLinear") else _WEIGHT_ONLY
    for key, value in required.items():
        options.add_session_config_entry(key, value)
    if external_data_dir is not None:
        options.add_session_config_entry(_EXTERNAL_FOLDER, os.fspath(external_data_dir))
    if not isinstance(path, bytes):
        path = os.fspath(path)
    if reason is None:
        return ort.InferenceSession(path, sess_options=options, providers=list(providers), **kwargs)
    name = "the serialized model" if isinstance(path, bytes) else path
    asked = options.graph_optimization_level
    logger.warning("%s is opened at %s instead of %s: %s", name, basic.name, asked.name, reason)
    with _at(options, basic):
        session = ort.InferenceSession(path, sess_options=options, providers=list(providers), **kwargs)
    _stay_at(session, options, basic)
    return session


def _errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises, which has no common class."""
    import_onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = (getattr(state, name) for name in dir(state))
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))


def _above_basic(options: Any) -> bool:
    levels = import_onnxruntime().GraphOptimizationLevel
    return options.graph_optimization_level not in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC)


def _why_basic(view: ModelView) -> str | None:
    """Why ONNX Runtime computes a file wrong above "basic", None if it does not."""
    relus = dropped_relus(onnx_ir.serde.deserialize_model(view.flat))
    if not relus:
        return None
    more = f" and {len(relus) - 1} more" if len(relus) > 1 else ""
    return (
        f"above that, ONNX Runtime drops {describe(onnx_ir.to_proto(relus[0]))}{more}, in front of an FP8 "
        "QuantizeLinear, and gives wrong numbers; qcompile repair writes such files so that any level is right"
    )


@contextlib.contextmanager
def _at(options: Any, level: Any) -> Iterator[None]:
    """`options` with another level of optimization for a while."""
    asked = options.graph_optimization_level
    options.graph_optimization_level = level
    try:
        yield
    finally:
        options.graph_optimization_level = asked


def _stay_at(session: Any, options: Any, level: Any) -> None:
    """Let `session` keep its level when it opens the file anew, for other providers, with the caller's options."""
    reopen = session.set_providers

    def set_providers(*args: Any, **kwargs: Any) -> None:
        with _at(options, level):
            reopen(*args, **kwargs)

    session.set_providers = set_providers
