"""Whether a file can be written at all, and has room: known before the work that makes it."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from qcompile.errors import QCompileError

_DEVICES = (Path("/dev"), Path("/dev/fd"), Path("/proc/self/fd"))
_MADE_HERE = (".onnx", ".data", ".engine", ".plan", ".trt", ".pt2")


def check_writable(*paths: Path | None, error: type[QCompileError] = QCompileError, parents: bool = False) -> None:
    """Raise `error` for a file (None: there is none) that could not be written beside its name and moved in place.

    A folder is made beside it for a moment: permissions and a read-only disk show themselves by that alone. What stands
    at a path is not touched.

    Args:
        parents: directories that are missing are made by whoever writes.
    """
    for path in paths:
        if path is not None:
            _check_writable(path, error, parents)


def _check_writable(path: Path, error: type[QCompileError], parents: bool) -> None:
    try:
        if why := _why_not(path, parents):
            raise error(f"cannot write {path}: {why}")
    except OSError as cause:
        raise error(f"cannot write {path}: {cause.strerror or cause}") from cause


def _why_not(path: Path, parents: bool) -> str | None:
    if path.is_dir():
        return "it is a directory; name a file in it"
    if path.is_symlink() and not path.exists():
        return "it is a link to nothing"
    # /dev/stdout may lead to a regular file
    if path.absolute().parent in _DEVICES or (path.exists() and not stat.S_ISREG(path.stat().st_mode)):
        return "it is no regular file, which a complete one could take the place of"
    if path.exists() and not os.access(path, os.W_OK):
        return "it is read-only"
    wanted = path.resolve().parent
    folder = _existing(wanted) if parents else wanted
    if not folder.is_dir():
        return f"there is no directory {folder}, and what does not exist is not made"
    path.with_name(path.name).exists()  # raises for a name that is too long
    tempfile.TemporaryDirectory(prefix=".qcompile-", dir=folder).cleanup()
    return None


def check_distinct(
    outputs: Mapping[str, Path | None],
    inputs: Iterable[tuple[str, str | os.PathLike[str] | None]],
    error: type[QCompileError] = QCompileError,
) -> None:
    """Raise `error` if an output is an input, or two outputs are one file, however they are spelled.

    Args:
        outputs, inputs: what each is called in a message, and its path. Of a directory all files may be read, so that
            none of them is an output but those of the kinds that this package writes.
    """
    given = {name: path for name, path in outputs.items() if path is not None}
    seen: dict[object, str] = {}
    for name, path in given.items():
        for written in (path, path.with_name(f"{path.name}.data")) if path.suffix == ".onnx" else (path,):
            if (other := seen.setdefault(_identity(written), name)) != name:
                raise error(f"{other} and {name} are one file, {path}: give each its own name")
    for what, source in inputs:
        if source is None:
            continue
        for name, path in given.items():
            if path.exists() and _reads(Path(source), path):
                raise error(f"{name} {path} is {what}: name another file, or that is lost")


def _identity(path: Path) -> object:
    """Equal for two paths of one file, which need not be there."""
    if path.exists():
        found = path.stat()
        return found.st_dev, found.st_ino
    return path.resolve()


def _reads(source: Path, path: Path) -> bool:
    """Whether who reads `source`, a file or a directory, reads the file `path`."""
    if source.is_dir():
        return source.resolve() in path.resolve().parents and not path.name.lower().endswith(_MADE_HERE)
    return source.exists() and source.samefile(path)


def check_room(sizes: Mapping[Path, int], error: type[QCompileError] = QCompileError) -> None:
    """Raise `error` if a disk has less room than the files that go there need.

    Args:
        sizes: path of a file -> the bytes that it will have at least. An older file of that name is counted as one that
            stays, as it is there until the new one is complete.
    """
    wanted: dict[int, list[Path]] = defaultdict(list)
    folders = {path: _existing(path.absolute().parent) for path in sizes}
    for path, folder in folders.items():
        wanted[folder.stat().st_dev].append(path)
    for paths in wanted.values():
        needed = sum(sizes[path] for path in paths)
        free = shutil.disk_usage(folders[paths[0]]).free
        if free < needed:
            raise error(
                f"no room for {', '.join(map(str, paths))}: about {needed:,} bytes are needed, and {free:,} are free on"
                f" that disk; free {needed - free:,} more, or write to another one"
            )


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest directory above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
