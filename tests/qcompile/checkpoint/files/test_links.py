"""Directories of strangers: their links and indexes reach no file outside, their configs no code but of models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qcompile.checkpoint.files.directory import carry_over
from qcompile.checkpoint.files.headers import open_directory
from qcompile.checkpoint.load import load_checkpoint
from qcompile.errors import CalibrationError, CheckpointError, QCompileError, SourceError
from qcompile.source.load import load_source
from qcompile.source.preprocessing import TEXT, load_preprocessor

WEIGHTS, INDEX, BIN = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tokenizer_config.json").write_text("{}")
    return tmp_path / "source"


def moved(name: str) -> Callable[[Path], None]:
    """Its place is taken by a link to it, elsewhere."""

    def change(source: Path) -> None:
        (source / name).rename(source.parent / name)
        (source / name).symlink_to(f"../{name}")

    return change


def indexed(index: str, weights: str) -> Callable[[Path], None]:
    """The weights are in another directory, and the index says so."""

    def change(source: Path) -> None:
        state = transformers.BertModel.from_pretrained(source).state_dict()
        if weights == BIN:
            torch.save(state, source.parent / weights)
        else:
            (source / WEIGHTS).rename(source.parent / weights)
        (source / WEIGHTS).unlink(missing_ok=True)
        (source / "pytorch_model-1.bin" if weights == BIN else source / "part-1.safetensors").touch()
        places = dict.fromkeys(state, f"../{weights}")
        (source / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return change


def configured(**fields: Any) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, **fields}))

    return change


LEADS_OUT = "is a link that leads out of its directory"
OUTSIDE = r"names \.\./\S+, which is no file of this directory"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved("config.json"), LEADS_OUT),
        (moved(WEIGHTS), LEADS_OUT),
        (indexed(INDEX, WEIGHTS), OUTSIDE),
        (indexed(f"{BIN}.index.json", BIN), OUTSIDE),
        (configured(transformers_weights="part/model.safetensors"), "which is no file of this directory"),
        (configured(architectures=["pipeline"]), "has no pipeline among its models"),
        (configured(architectures=["BertTokenizer"]), "has no BertTokenizer among its models"),
        (configured(architectures=["__name__"]), "has no __name__ among its models"),
        (configured(attn_implementation="someone/kernel"), "asks for 'someone/kernel' as attn_implementation"),
        (configured(num_hidden_layers=1 << 31), "num_hidden_layers is 2147483648, more than 1000, which no model has"),
    ],
)
def test_nothing_outside_is_read_and_no_code_but_of_models_looked_up(
    source: Path, change: Callable[[Path], None], message: str
) -> None:
    change(source)
    with pytest.raises(SourceError, match=message):
        load_source(str(source))


@pytest.mark.parametrize(
    ("name", "read", "error"),
    [
        (WEIGHTS, open_directory, CheckpointError),
        ("config.json", load_checkpoint, CheckpointError),
        ("tokenizer_config.json", lambda path: load_preprocessor(TEXT, str(path), "text"), CalibrationError),
    ],
)
def test_each_reader_follows_no_link_out_of_a_directory(
    source: Path, name: str, read: Callable[[Path], object], error: type[QCompileError]
) -> None:
    moved(name)(source)
    with pytest.raises(error, match=LEADS_OUT):
        read(source)


def cached(source: Path, blobs: Path) -> Path:
    """The same in the layout of the hub's cache: `snapshots/<revision>/<file>` -> `../../blobs/<hash>`."""
    snapshot = source.parent / "models--me--it" / "snapshots" / "0f"
    snapshot.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_snapshot_of_the_hub_is_read_and_carried_over(source: Path, tmp_path: Path) -> None:
    snapshot = cached(source, source.parent / "models--me--it-blobs")
    with pytest.raises(SourceError, match=r"no config\.json"):  # the blobs are elsewhere
        load_source(str(snapshot))
    (tmp_path / "models--me--it" / "blobs").symlink_to("../models--me--it-blobs")
    with pytest.raises(SourceError, match=LEADS_OUT):  # a link in their place could lead anywhere
        load_source(str(snapshot))
    (tmp_path / "models--me--it" / "blobs").unlink()
    (tmp_path / "models--me--it-blobs").rename(tmp_path / "models--me--it" / "blobs")
    assert load_source(str(snapshot)).dims["input_ids"] == [1, 128]
    (tmp_path / "new").mkdir()
    assert carry_over(snapshot, tmp_path / "new") == []
    assert (tmp_path / "new" / "tokenizer_config.json").read_text() == "{}"


def test_links_out_of_a_directory_are_not_carried_over_and_listed(source: Path, tmp_path: Path) -> None:
    private, templates = tmp_path / "private", source / "additional_chat_templates"
    private.mkdir()
    templates.mkdir()
    (private / "key.txt").write_text("secret")
    (templates / "tool.jinja").write_text("template")
    for link, target in {
        "inside.txt": "tokenizer_config.json",
        "outside.txt": "../private/key.txt",
        "absolute.txt": str(private / "key.txt"),
        "circle.txt": "circle.txt",
        "chain.txt": "outside.txt",
        "additional_chat_templates/stolen.jinja": "../../private/key.txt",
        "additional_chat_templates/folder": "../../private",
    }.items():
        (source / link).symlink_to(target)
    target = tmp_path / "new"
    target.mkdir()
    left = carry_over(source, target)
    assert set(left) == {
        *("outside.txt", "absolute.txt", "circle.txt", "chain.txt"),
        *("additional_chat_templates/stolen.jinja", "additional_chat_templates/folder"),
    }
    copied = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert copied == {"tokenizer_config.json", "inside.txt", "additional_chat_templates/tool.jinja"}


def test_a_folder_of_templates_that_is_a_link_out_is_left(source: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_text("secret")
    (source / "additional_chat_templates").symlink_to("../private")
    (tmp_path / "new").mkdir()
    assert carry_over(source, tmp_path / "new") == ["additional_chat_templates"]
    assert not list((tmp_path / "new").rglob("key.txt"))
