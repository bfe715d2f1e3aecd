"""How texts and images become inputs, where the user says so and the directory's files do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.errors import CalibrationError

TEXT_FILES = "files of text (.txt, .jsonl)"
IMAGE_FOLDERS = "folders of images"
OTHERS = "other data"
_LARGEST = 10_000


@dataclass(frozen=True)
class Preparation:
    """Everything is optional; the names are those of `qcompile.calibration_data` and of options of the command line.

    Attributes:
        processor: a Hugging Face directory whose tokenizer or image processor is used in the place of the model's.
        sequence_length: tokens in a sample of text.
        pack: whether samples are cut from all texts one after another, or hold one text each. None: packed for models
            without an attention mask, which are decoders.
        text_column: the key of a line of JSON that has the text, or the messages of a chat.
        image_size: height and width. image_mean, image_std: of each channel, or one for all, of numbers from 0 to 1.
            With any of these no image processor is needed, and none is used.
    """

    processor: str = ""
    sequence_length: int | None = None
    pack: bool | None = None
    text_column: str | None = None
    image_size: tuple[int, int] | None = None
    image_mean: Sequence[float] | None = None
    image_std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        """Raises CalibrationError for numbers that no image has."""
        if self.image_size is not None and not all(1 <= side <= _LARGEST for side in self.image_size):
            raise CalibrationError(f"an image size of {self.image_size}: sides have 1 to {_LARGEST} pixels")
        for name, numbers in (("image mean", self.image_mean), ("image std", self.image_std)):
            if numbers is not None and (len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers))):
                raise CalibrationError(f"an {name} of {list(numbers)}: give a number for each channel, or one for all")
        if self.image_std is not None and min(self.image_std) <= 0:
            raise CalibrationError(f"an image std of {list(self.image_std)}: images are divided by it")

    @property
    def prepares_images(self) -> bool:
        return not (self.image_size is None and self.image_mean is None and self.image_std is None)

    def check(self, data: str, kind: str) -> None:
        """Raise CalibrationError for what says nothing of `data`, which are of a kind."""
        text = {"a text column": self.text_column is not None, "packing": self.pack is not None}
        given = {
            TEXT_FILES: [name for name, is_given in text.items() if is_given],
            IMAGE_FOLDERS: ["an image size, mean or std"] if self.prepares_images else [],
        }
        for other, names in given.items():
            if names and other != kind:
                raise CalibrationError(f"{' and '.join(names)}: for {other}, and not for {data}")
        if self.text_column is not None and not data.endswith(".jsonl"):
            raise CalibrationError(f"a text column: for .jsonl files, and not for {data}, where each line is a text")
        if self.processor and kind == OTHERS:
            raise CalibrationError(f"a processor prepares texts and images, and not {data}")


AS_THE_MODEL_SAYS = Preparation()
