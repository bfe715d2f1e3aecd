"""The image processor or the tokenizer that a Hugging Face directory has beside its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcompile.checkpoint.files.json_files import read_json
from qcompile.checkpoint.files.links import check_inside
from qcompile.checkpoint.hub.config import import_transformers
from qcompile.errors import CalibrationError
from qcompile.messages import first_line, value

IMAGES, TEXT = "AutoImageProcessor", "AutoTokenizer"
_WORDS = {IMAGES: ("images", "image processor"), TEXT: ("text", "tokenizer")}
_FILES = {
    IMAGES: ("preprocessor_config.json", "processor_config.json"),
    TEXT: ("tokenizer.json", "tokenizer_config.json"),
}

_INSTEAD = {
    IMAGES: "say how to prepare them (--image-size, --image-mean, --image-std), name one with --processor",
    TEXT: "name one with --processor",
}

_SIDES, _LONGEST_SIDE = ("size", "crop_size", "height", "width"), 10_000


def load_preprocessor(kind: str, model: str, data: object) -> Any:
    """What transformers' class `kind` makes of the directory `model`. Nothing of it is run.

    Raises:
        CalibrationError: says what `model` lacks for `data`, or which of its files is a link that leads out of it.
    """
    content, what = _WORDS[kind]
    instead = f"{_INSTEAD[kind]}, give tensors (.safetensors, .npz), or a function (package.module:function)"
    instead += " that returns batches"
    if not Path(model).is_dir():
        raise CalibrationError(
            f"{data} holds {content}, for the {what} of a Hugging Face directory, and {model or 'the source'} is none:"
            f" {instead}"
        )
    for file in filter(Path.is_file, Path(model).iterdir()):  # each class has its own
        check_inside(file, Path(model), CalibrationError)
    transformers = import_transformers(CalibrationError, silent=True)
    for name in _FILES[kind] if kind == IMAGES else ():
        if (Path(model) / name).is_file():
            _check_sides(read_json(Path(model) / name, CalibrationError), Path(model) / name)
    try:
        return getattr(transformers, kind).from_pretrained(model, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, ImportError, KeyError, and what `tokenizers` raises
        if not any((Path(model) / name).is_file() for name in _FILES[kind]) and not isinstance(error, ImportError):
            raise CalibrationError(
                f"{model} has no {what} for {data} ({' or '.join(_FILES[kind])}): copy it from where the model is from,"
                f" or {instead}"
            ) from error
        raise CalibrationError(f"the {what} of {model} cannot be loaded: {first_line(error)}") from error


def _check_sides(content: object, file: Path, key: str = "") -> None:
    """Refuse images larger than anybody has: they would be made, and fill the memory."""
    if isinstance(content, dict):
        for name, part in content.items():
            _check_sides(part, file, name)
    elif isinstance(content, int | float) and key in _SIDES and not 0 <= content <= _LONGEST_SIDE:
        raise CalibrationError(
            f"{file}: {key} is {value(content)}, and images have up to {_LONGEST_SIDE} pixels a side"
        )
