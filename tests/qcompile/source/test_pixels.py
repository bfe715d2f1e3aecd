"""Images prepared by a size, mean and std: the pixels that transformers' image processor gives for the same numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.errors import CalibrationError, SourceError
from qcompile.source.preparation import Preparation

Image = pytest.importorskip("PIL.Image")


class Model(nn.Module):
    def forward(self, image: Tensor, gain: Tensor | None = None) -> Tensor:
        return image.mean((2, 3)) if gain is None else image.mean((2, 3)) * gain


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photographs that scikit-learn has, and what else people have: gray, with alpha, another size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-learn has the photographs")
    for name in ("china.jpg", "flower.jpg"):
        (folder / name).write_bytes((Path(spec.origin).parent / "datasets" / "images" / name).read_bytes())
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 4), np.uint8)
    Image.fromarray(noise, "RGBA").save(folder / "alpha.png")
    Image.fromarray(noise[..., 0], "L").save(folder / "gray.png")
    return folder


def test_they_are_those_of_an_image_processor(photos: Path) -> None:
    transformers = pytest.importorskip("transformers")
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    found = qcompile.calibration_data(
        photos, Model(), (torch.zeros(2, 3, 32, 48),), image_size=(32, 48), image_mean=mean, image_std=std
    )
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 48}, image_mean=mean, image_std=std)
    images = [Image.open(path).convert("RGB") for path in sorted(photos.iterdir())]
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(torch.cat([batch[0] for batch in found]), expected, rtol=0, atol=1e-5)
    assert len(found) == 2 and found.place(1) == f"{photos / 'flower.jpg'}, {photos / 'gray.png'}" and not found.notices


def test_a_model_of_gray_images_and_what_is_not_said(photos: Path) -> None:
    """Size and channels are those of the input, under whatever name; a default is told."""
    found = qcompile.calibration_data(photos, Model(), kwargs={"image": torch.zeros(1, 1, 8, 8)}, image_mean=0.5)
    gray = Image.open(photos / "gray.png").resize((8, 8), Image.Resampling.BILINEAR)
    expected = (torch.from_numpy(np.array(gray)).float() / 255 - 0.5) / torch.tensor([0.229, 0.224, 0.225]).mean()
    torch.testing.assert_close(found[3]["image"][0, 0], expected)
    assert found.notices == [f"{photos}: the std of ImageNet, as none is given"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, r"an image size of \(0, 0\)"),
        ({"image_std": 0.0}, "images are divided by it"),
        ({"image_mean": (0.5, 0.5)}, "give a number for each channel, or one for all"),
        ({"image_mean": float("nan")}, "give a number for each channel"),
        ({"image_mean": 0.5, "pack": True}, "packing: for files of text"),
        (
            {"image_mean": (0.5, 0.5, 0.5), "args": (torch.zeros(1, 1, 8, 8),)},
            "3 numbers of mean or std, and the model takes 1",
        ),
        ({"image_mean": 0.5, "args": (torch.zeros(1, 4, 8, 8),)}, "takes 4 channels, and images have 3"),
        ({"image_mean": 0.5, "args": (torch.zeros(1, 8),)}, "takes image, of which 0 can be images"),
        (
            {"image_mean": 0.5, "args": (torch.zeros(1, 3, 8, 8), torch.ones(1))},
            "takes gain, too, which a folder of images",
        ),
        ({"image_size": 16}, r"image is \[1, 3, 16, 16\], but the model was captured with \[1, 3, 8, 8\]"),
        ({}, "say how to prepare them"),
    ],
)
def test_errors(options: dict[str, Any], message: str, photos: Path) -> None:
    given = {"args": (torch.zeros(1, 3, 8, 8),), **options}
    with pytest.raises(CalibrationError, match=message):
        list(qcompile.calibration_data(photos, Model(), **given))


def test_a_broken_image_is_named(photos: Path) -> None:
    (photos / "cut.jpg").write_bytes((photos / "china.jpg").read_bytes()[:2000])
    found = qcompile.calibration_data(photos, Model(), (torch.zeros(1, 3, 8, 8),), image_mean=0.5)
    with pytest.raises(CalibrationError, match=r"cut\.jpg cannot be read as an image, take it out"):
        list(found)


def test_tensors_and_programs(tmp_path: Path) -> None:
    """The same function reads files of tensors; a NaN in one is told with the samples that it is in."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8).eval(), torch.randn(6, 8)
    x[5, 2] = torch.nan
    np.savez(tmp_path / "a.npz", input=x.numpy())
    program = torch.export.export(model, (x[:2],))
    for source, args in ((model, (x[:2],)), (program, ())):
        data = qcompile.calibration_data(tmp_path / "a.npz", source, args)
        assert len(data) == 3 and torch.equal(data[0][0], x[:2]) and len(data[1:]) == 2
    with pytest.raises(CalibrationError, match=r"batch 2 \(.*a\.npz, samples 4 to 5\), whose input_1 holds NaN"):
        qcompile.quantize(program, recipe="fp8", calibration=data, progress=False)
    good = qcompile.calibration_data(tmp_path / "a.npz", program, samples=4)
    assert qcompile.quantize(program, recipe="fp8", calibration=good, progress=False)


def test_what_it_cannot_know(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="there is no calibration data random"):
        qcompile.calibration_data("random", Model())
    np.save(tmp_path / "a.npy", np.zeros((4, 8), np.float32))
    with pytest.raises(SourceError, match="Model is no model of transformers: give args or kwargs"):
        qcompile.calibration_data(tmp_path / "a.npy", Model())
    assert Preparation(image_mean=(-0.5,)).prepares_images
