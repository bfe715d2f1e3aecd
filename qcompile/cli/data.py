"""The options of every command that calibrates: which data, how much of them, and how they are prepared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from qcompile.cli.options import UsageError
from qcompile.cli.parameters import SEVERAL, check_sizes

if TYPE_CHECKING:
    from qcompile.source import Preparation

_DATA = Parameter(group=Group("Calibration data", sort_key=4))
_EITHER = Parameter(show_default=False)


@Parameter(name="*")
@dataclass(frozen=True)
class DataOptions:
    """What calibrates.

    Parameters
    ----------
    calibration:
        Data that fixes the ranges of activations. For a Hugging Face directory: a folder of images, which its processor
        prepares, or a .txt or .jsonl file (a line, or its "text", or the "messages" of a chat, is a sample), which its
        tokenizer reads. For any model: a .safetensors, .npz or .pt file with a tensor for each input, by name, samples
        on the first axis; a .npy file for a model with one input; package.module:function, which returns an iterable of
        batches; or "random", to try out without data (what is made is then of no other use). A directory's example
        inputs have the sizes of the data.
    samples:
        How many samples to calibrate with. Default: 128 images, evenly spread over the folder, or the first 128 of a
        text; all of tensors and functions. A notice says if more would have changed the ranges.
    sequence:
        Tokens in a directory's example inputs, and in samples of text. Default: those of calibration data in tensors;
        512 in texts for decoders, else 128; less if the model, or the text, has less.
    pack:
        Cut samples from all texts one after another, with the end of sequence between them; or, with --no-pack, a text
        a sample, cut off and filled up, which a decoder needs an input attention_mask for: it gets one. Default: packed
        for models without an attention mask.
    text_column:
        The key of each line of a .jsonl file that has the text, or a chat. Default: text, else messages.
    image_size:
        Resize images to this height and width, as 224 or 256x128, and not with an image processor. Default: those of
        the model, if a mean or std is given.
    image_mean:
        Subtract this from images, whose numbers are then 0 to 1: one for all channels or one for each, such as 0.485
        0.456 0.406. Default: ImageNet's, if a size or std is given.
    image_std:
        Divide by this: 0.229 0.224 0.225. Default: ImageNet's, if a size or mean is given.
    processor:
        Hugging Face directory whose tokenizer or image processor prepares the data. Default: the model's.
    """

    calibration: Annotated[str | None, _DATA] = None
    samples: Annotated[int | None, _DATA] = None
    sequence: Annotated[int | None, _DATA, Parameter(name=("--sequence", "--sequence-length"))] = None
    pack: Annotated[bool | None, _DATA, _EITHER] = None
    text_column: Annotated[str | None, _DATA] = None
    image_size: Annotated[str | None, _DATA] = None
    image_mean: Annotated[tuple[float, ...], _DATA, SEVERAL] = ()
    image_std: Annotated[tuple[float, ...], _DATA, SEVERAL] = ()
    processor: Annotated[str | None, _DATA] = None

    def check(self) -> None:
        """Raise UsageError for what cannot be read, or is for data that are not given."""
        check_sizes({"--sequence": self.sequence, "--samples": self.samples})
        self._size()
        others = {
            "--samples": self.samples,
            "--pack": self.pack,
            "--text-column": self.text_column,
            "--image-size": self.image_size,
            "--image-mean": self.image_mean or None,
            "--image-std": self.image_std or None,
            "--processor": self.processor,
        }
        if self.calibration is None and (given := [name for name, value in others.items() if value is not None]):
            are = "is" if len(given) == 1 else "are"
            raise UsageError(f"{', '.join(given)} {are} for calibration data: give --calibration, too")

    def preparation(self) -> Preparation:
        """Raises CalibrationError for numbers that no image has."""
        from qcompile.source import Preparation

        return Preparation(
            processor=self.processor or "",
            sequence_length=self.sequence,
            pack=self.pack,
            text_column=self.text_column,
            image_size=self._size(),
            image_mean=self.image_mean or None,
            image_std=self.image_std or None,
        )

    def _size(self) -> tuple[int, int] | None:
        if self.image_size is None:
            return None
        if not (match := re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", self.image_size)):
            raise UsageError(f"--image-size {self.image_size}: write it as 224, or height x width, such as 256x128")
        return int(match[1]), int(match[2] or match[1])


NO_DATA = DataOptions()
