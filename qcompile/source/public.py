"""`qcompile.calibration_data`: files of texts, images and tensors as batches, by the same code as the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompile.capture.batches import PlacedBatches
from qcompile.checkpoint.hub.config import (
    auto_config,
    import_transformers,
    meta_model,
    model_class,
    read_config,
    unquantized,
)
from qcompile.errors import CalibrationError, SourceError
from qcompile.source.calibration import open_calibration
from qcompile.source.data import Data
from qcompile.source.examples import Sizes, example_inputs
from qcompile.source.model import Source
from qcompile.source.preparation import Preparation
from qcompile.source.state_files import StateFile


def calibration_data(
    data: str | os.PathLike[str],
    model: str | os.PathLike[str] | torch.nn.Module | ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    samples: int | None = None,
    batch_size: int = 1,
    sequence_length: int | None = None,
    pack: bool | None = None,
    text_column: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    image_mean: float | Sequence[float] | None = None,
    image_std: float | Sequence[float] | None = None,
    processor: str | os.PathLike[str] | None = None,
) -> PlacedBatches:
    """Batches of a file or folder, made for the inputs of a model.

    >>> data = qcompile.calibration_data("texts.jsonl", "./llama", sequence_length=512)
    >>> program = qcompile.quantize(model, kwargs=data[0], calibration=data)

    Args:
        data: a `.txt` file, whose lines are texts; a `.jsonl` file with a "text" or the "messages" of a chat on each
            line; a folder of images; a `.safetensors`, `.npz`, `.npy` or `.pt` file of tensors by the names of inputs,
            samples first.
        model: a Hugging Face directory, of which config.json is read and no weights; a module; or a program.
        args, kwargs: example inputs of a module, as `quantize` gets them. Models of transformers, and directories, need
            none: then they are made, `batch_size` of them.
        samples: how many to take. None: all that tensors have, the first 128 of a text, 128 images evenly spread.
        batch_size: with `args` or `kwargs`, and for a program, theirs counts.
        sequence_length: tokens in a sample of text, where there are no example inputs that say it. None: 512 for
            decoders, else 128; less if the model, or the text, has less.
        pack: cut samples from all texts one after another. None: where the model takes no attention mask.
        text_column: the key that has the text, or the chat; None: "text", else "messages".
        image_size, image_mean, image_std: height and width, and for each channel, or all, what is subtracted from
            numbers of 0 to 1, and what they are divided by. With any of these no image processor is used; None is the
            size of the example inputs, and ImageNet's mean and std.
        processor: a Hugging Face directory whose tokenizer or image processor prepares the data. None: that of `model`.

    Returns:
        A sequence of batches, in the form that the model is called with, which are made when they are asked for. It is
        the `calibration` of `quantize`, `calibrate` and `import_quantized`. `place(i)` says where batch `i` is from;
        `notices` what the user should know, which reports repeat.

    Raises:
        CalibrationError: names the file, and the line or key in it. SourceError: the inputs of the model are not known.
    """
    if not Path(data).exists():
        raise CalibrationError(f"there is no calibration data {data}")
    how = Preparation(
        processor=os.fspath(processor) if processor is not None else "",
        sequence_length=sequence_length,
        pack=pack,
        text_column=text_column,
        image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
        image_mean=_numbers(image_mean),
        image_std=_numbers(image_std),
    )
    for name, size in (("samples", samples), ("batch_size", batch_size), ("sequence_length", sequence_length)):
        if size is not None and size < 1:
            raise CalibrationError(f"{name}={size}: a size is 1 or more")
    opened = open_calibration(os.fspath(data), _directory(model), samples, how)
    if isinstance(opened, StateFile):
        raise CalibrationError(f"{data} is a calibrated state and no data: read it with safetensors.torch.load_file")
    batches = opened.batches(_source(model, args, kwargs or {}, opened, batch_size, sequence_length))
    assert isinstance(batches, PlacedBatches)
    return batches


def _numbers(given: float | Sequence[float] | None) -> Sequence[float] | None:
    return (float(given),) if isinstance(given, int | float) else given


def _directory(model: object) -> str:
    """Where the tokenizer or image processor is."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    return str(getattr(model, "name_or_path", ""))


def _source(
    model: str | os.PathLike[str] | torch.nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    data: Data,
    batch: int,
    tokens: int | None,
) -> Source:
    """The model with example inputs: those that are given, or its own, or what `config` makes up."""
    name = type(model).__name__
    if isinstance(model, ExportedProgram):
        if model.example_inputs is None:
            raise SourceError("the program was saved without example inputs: give it those that it was exported with")
        own, own_kwargs = model.example_inputs
        return Source(model, tuple(own), dict(own_kwargs), name="the program")
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        read_config(path, SourceError)
        transformers = import_transformers(SourceError)
        config = unquantized(auto_config(transformers, path, SourceError))
        name, found = model_class(transformers, config, SourceError)
        model = meta_model(name, found, config, path, SourceError)
    assert isinstance(model, torch.nn.Module)
    if args or kwargs:
        return Source(model, tuple(args), dict(kwargs), name=name)
    if not hasattr(model, "main_input_name"):
        raise SourceError(f"{name} is no model of transformers: give args or kwargs, its example inputs")
    return Source(model, (), example_inputs(model, name, Sizes(batch, tokens, data.shapes())), name=name)
