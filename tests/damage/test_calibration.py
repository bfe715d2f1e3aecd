"""Calibration data that somebody else wrote, or damaged: calibrated with, or refused in one clear sentence."""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

import qcompile
from qcompile.source import Source, open_calibration
from tests.damage.support import judge, mutated_bytes, mutated_tree

SUFFIXES = (".pt", ".npz", ".npy", ".safetensors")


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = torch.nn.Embedding(16, 32), torch.nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.table(ids) + x)


def source() -> Source:
    torch.manual_seed(0)
    inputs = {"ids": torch.arange(8).reshape(2, 4), "x": torch.randn(2, 4, 32)}
    return Source(Two().eval(), (), inputs, name="two")


def batches(path: Path) -> list[Any]:
    return list(open_calibration(str(path)).batches(source()))


def use(path: Path) -> None:
    """Every batch runs, and has the sizes and dtypes that the model takes."""
    given = source()
    program = torch.export.export(given.model, (), given.kwargs)
    qcompile.quantize(program, recipe="fp8", calibration=batches(path), progress=False)


def _pt(tree: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def _npz(tree: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.asarray(value) for name, value in tree.items()})
    return buffer.getvalue()


def _npy(tree: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(list(tree.values())[-1]))
    return buffer.getvalue()


WRITERS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    ".pt": _pt,
    ".npz": _npz,
    ".npy": _npy,
    ".safetensors": lambda tree: save({name: torch.as_tensor(value).contiguous() for name, value in tree.items()}),
}


def tree(draw: random.Random) -> dict[str, Any]:
    """Good data, or with a tensor of another dtype, size, name or none at all."""
    found: dict[str, Any] = {"ids": torch.arange(16).reshape(4, 4), "x": torch.randn(4, 4, 32)}
    name = draw.choice(["ids", "x"])
    dtypes = (torch.complex64, torch.bool, torch.uint16, torch.float64, torch.int8, torch.float16)
    changes: list[Callable[[], Any]] = [
        lambda: found[name].to(draw.choice(dtypes)),
        lambda: found[name][:, : draw.randint(0, 3)],
        lambda: found[name][: draw.randint(0, 3)],
        lambda: found[name].reshape(-1),
        lambda: found[name] * draw.choice((-1, 1000, float("nan"), float("inf"))),
        lambda: found[name].sum(),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if draw.random() < 0.5:
            found[name] = draw.choice(changes)()
    if draw.random() < 0.2:
        found[draw.choice(("", "\x1b[31m", "mask", "ids.x", "n" * 5000))] = found.pop(draw.choice(list(found)))
    return found


def nested(draw: random.Random) -> Any:
    """What only a `.pt` file holds."""
    good, x = tree(draw), torch.randn(4, 4, 32)
    circle: list[Any] = []
    circle.append(circle)
    deep: Any = x
    for _ in range(draw.choice((3, 5000))):
        deep = [deep]
    others = {
        "sparse": {**good, "x": x.to_sparse()},
        "compressed": {**good, "x": x[0].to_sparse_csr()},
        "meta": {**good, "x": x.to("meta")},
        "huge": {
            "ids": torch.zeros(1, 4, dtype=torch.int64).expand(10**9, 4),
            "x": torch.zeros(1).expand(10**9, 4, 32),
        },
        "numbers": {0: x, "x": x},
        "bytes": {**good, "x": b"x"},
        "none": None,
        "list": [good, None, 3, "x", [x], {"x": x}],
        "batches": [good, {**good, "x": x.to_sparse()}],
        "circle": circle,
        "deep": deep,
        "inner": {**good, "x": {"x": x}},
        "tuple": tuple(good.values()),
        "empty": draw.choice(({}, [], ())),
        "parameter": {**good, "x": torch.nn.Parameter(x)},
    }
    return others[draw.choice(list(others))]


@pytest.mark.slow
def test_mutated_tensor_files(tmp_path: Path) -> None:
    draw, cases = random.Random(16), []
    torch.manual_seed(0)
    for number in range(500):
        suffix = draw.choice(SUFFIXES)
        if number % 5 == 0:
            suffix, data = ".pt", None
            try:
                data = _pt(nested(draw))
            except RecursionError:  # more than pickle itself writes
                data = _pt([[]])
        else:
            data = WRITERS[suffix](tree(draw))
        if number % 2:
            data = mutated_bytes(data, draw)
        case = tmp_path / f"{number}{suffix if draw.random() < 0.95 else draw.choice(SUFFIXES)}"
        case.write_bytes(data)
        cases.append(case)
    outcomes = judge(cases, use)
    assert min(outcomes["right"], outcomes["refused"]) > 50, outcomes


def words(model: Path) -> None:
    """A directory with a tokenizer of seven words, and a processor of images."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    known = {word: index for index, word in enumerate(("[PAD]", "[UNK]", "one", "two", "three"))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]").save_pretrained(model)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 8, "width": 8},
        "image_mean": [0.5] * 3,
    }
    (model / "preprocessor_config.json").write_text(json.dumps(processor))


LINES = b'{"text": "one two"}\n{"text": "two three one one"}\n\n{"text": "three"}\n' * 4
LIKE = {
    ".txt": {"input_ids": torch.zeros(2, 4, dtype=torch.int64)},
    ".jsonl": {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "attention_mask": torch.ones(2, 4)},
    "": {"pixel_values": torch.zeros(1, 3, 8, 8)},
}


def prepare(path: Path) -> None:
    """Texts and images become batches of the model's sizes."""
    data = next(path.glob("data*"))
    inputs = LIKE[data.suffix]
    if "attention_mask" in inputs:
        inputs = {**inputs, "attention_mask": inputs["attention_mask"].long()}
    given = Source(Two(), (), inputs, name="a model")
    for batch in open_calibration(str(data), str(path / "model")).batches(given):
        assert {name: (t.dtype, t.shape[1:]) for name, t in batch.items()} == {
            name: (t.dtype, t.shape[1:]) for name, t in inputs.items()
        }


def picture(suffix: str) -> bytes:
    image, buffer = pytest.importorskip("PIL.Image"), io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    image.fromarray(noise).save(buffer, "png" if suffix == ".png" else "jpeg")
    return buffer.getvalue()


@pytest.mark.slow
def test_mutated_texts_and_images(tmp_path: Path) -> None:
    """One file is mutated: of text, of an image, or of what prepares them."""
    draw, cases = random.Random(16), []
    words(tmp_path / "model")
    for number in range(200):
        case = tmp_path / str(number)
        (case / "model").mkdir(parents=True)
        kind = draw.choice(list(LIKE))
        contents = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
        if kind:
            contents[f"data{kind}"] = LINES
        else:
            suffix = draw.choice((".png", ".jpg"))
            contents[f"a{suffix}"] = picture(suffix)
        own = ("preprocessor_config.json",) if not kind else ("tokenizer.json", "tokenizer_config.json")
        name = draw.choice((list(contents)[-1], *own))
        if name.endswith(".json") and draw.random() < 0.7:
            contents[name] = json.dumps(mutated_tree(json.loads(contents[name]), draw)).encode()
        elif draw.random() < 0.9:
            contents[name] = mutated_bytes(contents[name], draw)
        for file, content in contents.items():
            folder = case / "model" if file.endswith(".json") else case if kind else case / "data"
            folder.mkdir(exist_ok=True)
            (folder / file).write_bytes(content)
        cases.append(case)
    outcomes = judge(cases, prepare)
    assert min(outcomes["right"], outcomes["refused"]) > 30, outcomes
