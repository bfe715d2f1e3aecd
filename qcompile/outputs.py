"""Whether a file can be written at all, and has room: known before the work that makes it."""

from __future__ import annotations

import os
import shutil
import stat
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from qcompile.errors import QCompileError


def check_writable(*paths: Path | None, error: type[QCompileError] = QCompileError, parents: bool = False) -> None:
    """Raise `error` for a file (None: there is none) that could not be written beside its name and moved in place.

    A file is made in the directory for a moment: permissions, a read-only disk and names that are too long show
    themselves by that alone. What stands at a path is not touched.

    Args:
        parents: directories that are missing are made by whoever writes.
    """
    for path in paths:
        if path is not None:
            _check_writable(path, error, parents)


def _check_writable(path: Path, error: type[QCompileError], parents: bool) -> None:
    if path.is_dir():
        raise error(f"cannot write {path}: it is a directory; name a file in it")
    folder = _existing(path.absolute().parent) if parents else path.absolute().parent
    if not folder.is_dir():
        raise error(f"cannot write {path}: there is no directory {folder}, and what does not exist is not made")
    # /dev/stdout may lead to a regular file, and a file moved in place would take the place of the link
    if folder.resolve() == Path("/dev") or (path.exists() and not stat.S_ISREG(path.stat().st_mode)):
        raise error(f"cannot write {path}: it is no regular file, which a complete one could be moved in place of")
    trial = folder / f".{path.name}.{os.getpid()}.part"
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as cause:
        raise error(f"cannot write {path}: {cause.strerror or cause}") from cause


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
