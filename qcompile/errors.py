"""The exceptions a user can meet, one tree under `QCompileError`, and what their messages have in common."""

from __future__ import annotations

from passes.errors import CompatError, PassError, QCompileError

__all__ = [
    "AlgorithmError",
    "CalibrationError",
    "CaptureError",
    "CheckpointError",
    "CompatError",
    "EngineError",
    "ExpectationError",
    "ExportError",
    "GenerationError",
    "JoinedError",
    "PassError",
    "QCompileError",
    "RecipeError",
    "RepairError",
    "ReportError",
    "SourceError",
    "VerificationError",
]


class SourceError(QCompileError):
    """A model source (directory, `.pt2` file, factory) could not be read."""


class CaptureError(QCompileError):
    """`torch.export` could not capture the model."""


class RecipeError(QCompileError):
    """A recipe is not valid, or asks for what this version cannot do."""


class CalibrationError(QCompileError):
    """Calibration data is missing, or a tensor has no usable range."""


class JoinedError(CalibrationError):
    """What went wrong on one rank of several, or between them: all of them raise it."""


class AlgorithmError(QCompileError):
    """A calibration algorithm failed, or chose what the recipe does not ask for."""


class ExportError(QCompileError):
    """A program could not be lowered to ONNX."""


class VerificationError(QCompileError):
    """An exported file failed a check; the file was not put in place."""


class EngineError(QCompileError):
    """The TensorRT builder refused the file or the request."""


class ExpectationError(QCompileError):
    """What was built falls short of what the caller said to expect."""


class CheckpointError(QCompileError):
    """A Hugging Face checkpoint is broken, or cannot say what it was asked to."""


class RepairError(QCompileError):
    """An ONNX file cannot be turned into one of standard operators; nothing was written."""


class GenerationError(QCompileError):
    """A file generates no text, or not what was asked for."""


class ReportError(QCompileError):
    """A file is no report, or one that this version does not read."""


class CompileError(QCompileError):
    """What `torch.compile(backend="qcompile")` was given, or captured, cannot be compiled."""
