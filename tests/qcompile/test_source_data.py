"""Folders of images and files of text: what comes in is what transformers' own processor and tokenizer make of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from qcompile.cli import main
from qcompile.errors import CalibrationError
from qcompile.source import Source, open_calibration

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 24}}
WORDS = ["[PAD]", "[UNK]", "[END]", "one", "two", "three", "café"]


class Named(nn.Module):
    def forward(self, **named: Tensor) -> Tensor:
        return next(iter(named.values()))


def source(**inputs: Tensor) -> Source:
    return Source(Named(), (), inputs, name="a model")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A directory with a processor and a tokenizer: a word each, [END] last."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 2)])
    directory = tmp_path / "model"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return str(directory)


def picture(mode: str, size: tuple[int, int] = (40, 30)) -> Any:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), np.uint8)
    return Image.fromarray(noise, "RGBA").convert("RGB").convert(mode)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Modes and sizes that people have, an image that lies on its side, a hidden file and a note."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, mode in {
        "rgb.png": "RGB",
        "gray.png": "L",
        "alpha.png": "RGBA",
        "bits.png": "1",
        "cmyk.jpg": "CMYK",
    }.items():
        picture(mode).save(folder / name)
    picture("RGB", (200, 50)).quantize(16).save(folder / "sub" / "palette.PNG")
    turned = picture("RGB")
    turned.getexif()[0x0112] = 6
    turned.save(folder / "sub" / "turned.jpg", exif=turned.getexif())
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "notes.md").write_text("holiday")
    return folder


def test_images_are_prepared_as_transformers_does(model: str, photos: Path) -> None:
    data = open_calibration(str(photos), model)
    assert data.shapes() == {"pixel_values": (1, 3, 32, 24)}
    batches = data.batches(source(pixel_values=torch.zeros(3, 3, 32, 24)))
    processor = transformers.AutoImageProcessor.from_pretrained(model)
    paths = sorted(path for path in photos.rglob("*") if path.suffix.lower() in (".png", ".jpg"))
    images = [transformers.image_utils.load_image(str(path)) for path in paths]
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    assert [len(batch["pixel_values"]) for batch in batches] == [3, 3, 1] and len(expected) == 7
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected)
    assert data.notices == [f"{photos}: notes.md left out: no images"]


def test_some_of_many_images_are_from_all_over_the_folder(model: str, photos: Path) -> None:
    data: Any = open_calibration(str(photos), model, samples=3)
    assert [path.name for path in data.paths] == ["bits.png", "gray.png", "palette.PNG"]
    assert str(data) == f"3 of 7 images of {photos}"


def refused(path: Path, model: str, message: str, **inputs: Tensor) -> None:
    with pytest.raises(CalibrationError, match=message):
        list(open_calibration(str(path), model).batches(source(**inputs)))


PIXELS = {"pixel_values": torch.zeros(1, 3, 32, 24)}
IDS = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "a.png").write_bytes(b"no picture"), r"a\.png cannot be read as an image"),
        (
            lambda f: (f / "a.jpg").write_bytes((f / "cmyk.jpg").read_bytes()[:700]),
            r"a\.jpg cannot be read as an image",
        ),
        (
            lambda f: Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(f / "a.png"),
            r"a\.png has more than 8 bits",
        ),
        (
            lambda f: Image.new("1", (8000, 8000)).save(f / "a.png"),
            r"a\.png is 8000 x 8000, more than 50000000 pixels",
        ),
        (
            lambda f: [p.unlink() for p in f.rglob("*.*") if p.name != "notes.md"],
            r"holds no images \(its files: 1 \.md\)",
        ),
        (lambda f: [p.unlink() for p in f.rglob("*.*")], "holds no images, and nothing else"),
    ],
)
def test_image_errors(model: str, photos: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(photos)
    refused(photos, model, message, **PIXELS)


def test_directories_that_cannot_prepare(model: str, photos: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one")
    refused(photos, "models:make", "models:make is none: say how to prepare them .*, give tensors", **PIXELS)
    refused(photos, str(photos), r"has no image processor .*preprocessor_config\.json.*copy it", **PIXELS)
    refused(text, str(photos), r"has no tokenizer .*tokenizer\.json", **IDS)
    refused(photos, model, "takes input_ids, too, which a folder of images does not give", **PIXELS, **IDS)
    refused(text, model, "takes pixel_values and no input_ids", **PIXELS)
    refused(text, model, "takes decoder_input_ids, too", **IDS, decoder_input_ids=IDS["input_ids"])
    (Path(model) / "tokenizer.json").write_text("{")
    refused(text, model, "the tokenizer of .* cannot be loaded", **IDS)


def encoded(text: bytes, path: Path, model: str, samples: int | None = None, **inputs: Tensor) -> Any:
    path.write_bytes(text)
    data = open_calibration(str(path), model, samples)
    batches = list(data.batches(source(**inputs)))
    return {name: torch.cat([batch[name] for batch in batches]).tolist() for name in inputs}, data.notices


def test_a_line_is_a_sample_of_a_model_with_a_mask(model: str, tmp_path: Path) -> None:
    text = "\ufeffone two\r\n\r\n  \r\ntwo three one two three\r\ncafé unknown".encode()
    found, notices = encoded(text, tmp_path / "a.txt", model, **IDS, attention_mask=IDS["input_ids"])
    assert found["input_ids"] == [[3, 4, 2, 0], [4, 5, 3, 2], [6, 1, 2, 0]]
    assert found["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert notices == [f"{tmp_path / 'a.txt'}: 1 of 3 lines are cut off after 4 tokens"]


def test_a_decoder_reads_line_after_line(model: str, tmp_path: Path) -> None:
    text = b'{"text": "one two"}\n\n{"text": "two three one two three", "id": 2}\n'
    found, _ = encoded(text, tmp_path / "a.jsonl", model, **IDS)
    assert found["input_ids"] == [[3, 4, 2, 4], [5, 3, 4, 5]]
    found, _ = encoded(text, tmp_path / "a.jsonl", model, 1, **IDS)
    assert found["input_ids"] == [[3, 4, 2, 4]]


@pytest.mark.slow
def test_the_first_command_of_a_new_user(
    model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of photographs to an FP8 ViT, a text file to an NVFP4 BERT."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=(32, 24), patch_size=8, **sizes))
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, **sizes))
    (tmp_path / "text.txt").write_text("one two three\n\n" * 5)
    for network, recipe, data, samples in ((vit, "fp8", photos, 7), (bert, "nvfp4", tmp_path / "text.txt", 5)):
        network.save_pretrained(model)
        file = tmp_path / f"{recipe}.onnx"
        assert main(["export", model, "-o", str(file), "--recipe", recipe, "--calibration", str(data)]) == 0
        assert "FAILED" not in capsys.readouterr().out
        kept = {p.key: p.value for p in onnx.load(file).metadata_props}
        assert kept["qcompile.calibration"] == f"{samples} samples" and kept["qcompile.recipe"] == recipe


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", b"", "has no line of text"),
        ("a.txt", b"\xef\xbb\xbf \r\n", "has no line of text"),
        ("a.txt", b"one\n\xff\xfe", "is no UTF-8 text"),
        ("a.txt", b"one\ntwo\0", r"a\.txt:2 holds a zero byte"),
        ("a.txt", b"one", "has 2 tokens, fewer than one sample of 4: give more text, or --sequence 2"),
        ("a.jsonl", b'{"text": "one"}\n{"text":', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"content": "one"}', r'a\.jsonl:1 has the keys content; an object with a string "text"'),
        ("a.jsonl", b"[1]", r"a\.jsonl:1 is a list"),
    ],
)
def test_text_errors(model: str, tmp_path: Path, name: str, text: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text)
    refused(tmp_path / name, model, message, **IDS)
