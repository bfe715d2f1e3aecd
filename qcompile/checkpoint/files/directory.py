"""The directory that a checkpoint is written to: complete, or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qcompile.checkpoint.files.json_files import CONFIG, HF_QUANT_CONFIG, INDEX, read_json
from qcompile.checkpoint.files.links import leads_out
from qcompile.errors import CheckpointError
from qcompile.files import folder_beside, move_directory

_WRITTEN_HERE = (CONFIG, HF_QUANT_CONFIG, INDEX)
# weights in any form, and what a trainer leaves behind
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx*")
_LEFT = (*_WEIGHTS, "*.ot", "*.npz", "*.nemo", "*.tflite", "*.mlmodel", "*.index.json", "*.part", "*.incomplete", ".*")
_DIRECTORIES = ("additional_chat_templates",)  # tokenizers read it
_LARGEST = 100_000_000


def check_new(directory: Path) -> None:
    """Refuse a directory that is not empty, or that cannot be made."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} is not empty: name a new directory, or delete what is in it")
    whole = directory.resolve()  # the other end of a link, too
    if whole == Path.cwd() or os.path.ismount(whole):
        raise CheckpointError(
            f"{directory} is the current directory or a mount point, which a complete one cannot take the place of:"
            " name a directory in it"
        )
    if not whole.parent.is_dir():
        raise CheckpointError(f"cannot write {directory}: there is no directory {whole.parent}")
    if not os.access(whole.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {directory}: {whole.parent} is not writable for this user")


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A folder to write into, renamed to `directory` when the body ends; after an error `directory` is as it was.

    Raises:
        CheckpointError: `directory` is a file or not empty, has no parent, or another process is writing it.
    """
    check_new(directory)
    directory = directory.resolve()
    try:
        with folder_beside(directory, CheckpointError, alone=True) as folder:
            yield folder
            check_new(directory)
            move_directory(folder, directory)
    except OSError as error:
        raise CheckpointError(f"writing {directory} failed: {error}; nothing was left behind") from error


def carry_over(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer and the other small files of `source`; returns the names of what was left.

    Left are weights in any form, the files that are written anew, hidden files, files above 100 MB, directories other
    than additional_chat_templates, links to nowhere, and links out of the directory: they may name anything.
    """
    left = []
    for path in sorted(source.iterdir()):
        if path.name in _WRITTEN_HERE or path.name.startswith("."):
            continue
        if path.is_dir() and path.name in _DIRECTORIES and not leads_out(path, source):
            (target / path.name).mkdir()
            for part in sorted(path.rglob("*")):
                if not _copied(part, source, target):
                    left.append(part.relative_to(source).as_posix())
        elif not _copied(path, source, target) and not path.match("*.safetensors"):
            left.append(path.name)
    return left


def _copied(path: Path, source: Path, target: Path) -> bool:
    if path.is_dir() and path.parent != source and not path.is_symlink():
        (target / path.relative_to(source)).mkdir()
        return True
    if leads_out(path, source) or not path.is_file() or any(path.match(glob) for glob in _LEFT):
        return False
    if path.stat().st_size > _LARGEST:
        return False
    shutil.copyfile(path, target / path.relative_to(source))
    return True


def write_configs(target: Path, config: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the JSON files of a format, config.json last.

    Args:
        config: that of the source.
        files: what is to be merged into each, config.json or a file that `carry_over` may have put there.
    """
    for name, content in files.items():
        if name != CONFIG:
            before = read_json(target / name) if (target / name).is_file() else {}
            _write(target / name, {**before, **content})
    _write(target / CONFIG, {**config, **files.get(CONFIG, {})})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
