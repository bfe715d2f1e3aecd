"""Calibration data in a folder of images, which the processor of the model's directory prepares."""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qcompile.errors import CalibrationError
from qcompile.messages import first_line, some
from qcompile.source.data import DEFAULT_SAMPLES, Data, LazyBatches, as_batch, batch_size, tensor_inputs
from qcompile.source.model import Source
from qcompile.source.pixels import PIXELS, Pixels, pixel_input
from qcompile.source.preparation import Preparation
from qcompile.source.preprocessing import IMAGES, load_preprocessor

_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # modes that Pillow cuts off at 255 on the way to RGB

_MOST_PIXELS = 50_000_000


class ImageFolder(Data):
    """The images of a folder and the folders in it, such as one for each class.

    Of more than `samples` images some are taken, evenly spread over their sorted paths, so that each folder is there.
    They are read as transformers reads them: turned upright as their EXIF data say, and converted to RGB.
    """

    def __init__(self, folder: Path, model: str, samples: int | None, how: Preparation) -> None:
        super().__init__(str(folder))
        self.paths, others = _images(folder)
        if not self.paths:
            raise CalibrationError(f"{folder} holds no images{_instead(others)}")
        self.total, samples = len(self.paths), DEFAULT_SAMPLES if samples is None else samples
        if self.total > samples:
            self.paths = [self.paths[(2 * i + 1) * self.total // (2 * samples)] for i in range(samples)]
        if others:
            self.notices.append(f"{folder}: {some([str(p.relative_to(folder)) for p in others])} left out: no images")
        self.how = how
        self.processor = (
            Pixels(how) if how.prepares_images else load_preprocessor(IMAGES, how.processor or model, folder)
        )
        if isinstance(self.processor, Pixels):
            self.notices += self.processor.notices(str(folder))

    def __str__(self) -> str:
        taken = len(self.paths)
        return f"{taken}{f' of {self.total}' if taken < self.total else ''} images of {self.name}"

    def shapes(self) -> dict[str, Sequence[int]]:
        if isinstance(self.processor, Pixels) and self.how.image_size is None:
            return {}  # that of the model
        return {name: tuple(value.shape) for name, value in self._prepared(self.paths[:1]).items()}

    def batches(self, source: Source) -> Iterable[Any]:
        wanted = tensor_inputs(source)
        size = batch_size(wanted)
        if len(self.paths) < size:
            raise CalibrationError(f"{self.name} has {len(self.paths)} images, fewer than one batch of {size}")
        if isinstance(self.processor, Pixels):
            name, example = pixel_input(wanted, source.name)
            self.processor = self.processor.of(example)
            given = [name]
        else:
            name, given = PIXELS, list(self.shapes())
        if missing := [name for name in wanted if name not in given]:
            raise CalibrationError(
                f"{source.name} takes {some(missing)}, too, which a folder of images does not give: take the part that"
                " reads images with --submodule, or give tensors of all inputs (.safetensors, .npz)"
            )

        def batch(start: int, stop: int) -> Any:
            found = self._prepared(self.paths[start:stop])
            tensors = found if name == PIXELS else {name: found[PIXELS]}
            return as_batch(source, tensors, place(start, stop))

        def place(start: int, stop: int) -> str:
            return some([str(path) for path in self.paths[start:stop]])

        return LazyBatches(batch, len(self.paths), size, place, self.notices)

    def _prepared(self, paths: Sequence[Path]) -> Any:
        images = [_read(path) for path in paths]
        try:
            return self.processor(images=images, return_tensors="pt")
        except Exception as error:  # whatever a processor makes of a size
            told = some([str(path) for path in paths])
            raise CalibrationError(f"{told}: {type(self.processor).__name__} fails: {first_line(error)}") from error


def _images(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images by their suffixes, and the other files; hidden ones, such as those that file managers leave, aside."""
    image = _pillow("Image")
    suffixes = {suffix for suffix, format in image.registered_extensions().items() if format in image.OPEN}
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    images = [path for path in files if path.suffix.lower() in suffixes]
    return images, [path for path in files if path.suffix.lower() not in suffixes]


def _instead(others: Sequence[Path]) -> str:
    if not others:
        return ", and nothing else: give a folder of pictures (.jpg, .png, ...)"
    kinds = Counter(path.suffix or "without a suffix" for path in others)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f" (its files: {told}): give a folder of pictures (.jpg, .png, ...), or a file: --calibration {others[0]}"


def _read(path: Path) -> Any:
    module = _pillow("Image")
    try:
        with module.open(path) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise CalibrationError(
                    f"{path} is {image.width} x {image.height}, more than {_MOST_PIXELS} pixels: scale it down"
                )
            if image.mode in _DEEP:
                raise CalibrationError(
                    f"{path} has more than 8 bits a channel (mode {image.mode}), which image processors do not take:"
                    " scale it to 8"
                )
            return _pillow("ImageOps").exif_transpose(image).convert("RGB")
    except CalibrationError:
        raise
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, DecompressionBombError
        raise CalibrationError(f"{path} cannot be read as an image, take it out: {first_line(error)}") from error


def _pillow(name: str) -> Any:
    if importlib.util.find_spec("PIL") is None:
        raise CalibrationError("reading images needs Pillow: pip install 'qcompile[images]'")
    return importlib.import_module(f"PIL.{name}")
