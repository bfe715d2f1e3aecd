"""The image processor or the tokenizer that a Hugging Face directory has beside its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompile.checkpoint.hub.config import import_transformers
from qcompile.errors import CalibrationError
from qcompile.messages import first_line

IMAGES, TEXT = "AutoImageProcessor", "AutoTokenizer"
_WORDS = {IMAGES: ("images", "image processor"), TEXT: ("text", "tokenizer")}
_FILES = {
    IMAGES: ("preprocessor_config.json", "processor_config.json"),
    TEXT: ("tokenizer.json", "tokenizer_config.json"),
}


def load_preprocessor(kind: str, model: str, data: object) -> Any:
    """What transformers' class `kind` makes of the directory `model`. Nothing of it is run.

    Raises:
        CalibrationError: says what `model` lacks for `data`.
    """
    content, what = _WORDS[kind]
    instead = "give tensors (.safetensors, .npz), or a function (package.module:function) that returns batches"
    if not Path(model).is_dir():
        raise CalibrationError(
            f"{data} holds {content}, for the {what} of a Hugging Face directory, and {model or 'the source'} is none:"
            f" {instead}"
        )
    transformers = import_transformers(CalibrationError, silent=True)
    try:
        return getattr(transformers, kind).from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, KeyError, and what `tokenizers` raises
        if not any((Path(model) / name).is_file() for name in _FILES[kind]) and not isinstance(error, ImportError):
            raise CalibrationError(
                f"{model} has no {what} for {data} ({' or '.join(_FILES[kind])}): copy it from where the model is from,"
                f" or {instead}"
            ) from error
        raise CalibrationError(f"the {what} of {model} cannot be loaded: {first_line(error)}") from error
