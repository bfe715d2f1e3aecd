"""Files and directories that are complete or not there: made in a folder beside their place, moved when they are whole.

The folder belongs to the process that holds its lock. What a killed process left has none, and is removed by the next
one that writes to the same directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from qcompile.errors import QCompileError

if sys.platform != "win32":
    import fcntl

_PREFIX, _MARKER, _INSIDE = ".qcompile-", ".partial", "new"
_FOLDER = re.compile(rf"{re.escape(_PREFIX)}[a-z0-9_]{{8}}")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


@contextlib.contextmanager
def replaced(path: Path, error: type[QCompileError] = QCompileError) -> Iterator[Path]:
    """A path to write a file to, of the same name; the file takes the place of `path` if the body succeeds.

    A link stays one, and what it leads to is replaced; the mode of an older file is kept. A crash or a full disk leaves
    the older file as it was.

    Raises:
        QCompileError: `error`, where the disk has no room, or the directory cannot be written to.
    """
    with folder_beside(path, error) as folder:
        yield folder / path.name
        move_all([folder / path.name], path)


@contextlib.contextmanager
def folder_beside(path: Path, error: type[QCompileError] = QCompileError, *, alone: bool = False) -> Iterator[Path]:
    """An empty folder on the disk of `path`, which may be a link, for as long as the body runs.

    Args:
        alone: raise `error` where another process has such a folder for the same path.
    """
    place = path.resolve()
    with said(path, error):
        busy = _remove_dead(place.parent)
        if alone and place.name in busy:
            raise error(f"another process is writing {path}: wait for it, or stop it")
        outer, lock = _new_folder(place)
    try:
        (outer / _INSIDE).mkdir()
        with said(path, error):
            yield outer / _INSIDE
    finally:
        _remove(outer)
        os.close(lock)


@contextlib.contextmanager
def said(path: Path, error: type[QCompileError]) -> Iterator[None]:
    """Raise `error`, with the name of what is written, for a disk without room and for what may not be written to."""
    try:
        yield
    except OSError as cause:
        full = cause.errno in _NO_ROOM or (cause.errno is None and "requested and" in str(cause))  # as numpy says it
        named = {Path(name).resolve() for name in (cause.filename, cause.filename2) if isinstance(name, str | Path)}
        ours = not named or any(path.resolve().parent in name.parents for name in named)  # what is read may fail, too
        if not full and not (ours and cause.errno in _REFUSED):
            raise
        why = "no room is left on the disk" if full else cause.strerror
        raise error(f"cannot write {path}: {why}; what was there before is as it was") from cause


def move_all(files: Sequence[Path], path: Path, old: Callable[[], Iterable[Path]] = tuple) -> None:
    """Move `files` beside what `path` leads to, the last one in its place, and remove what is `old` then.

    Meanwhile no other process does so in that directory, where its disk knows locks.

    Args:
        old: asked before the first move; those that are moved there stay.
    """
    place = path.resolve()
    with _alone(place.parent):
        places = [*(place.with_name(file.name) for file in files[:-1]), place]
        useless = set(old()) - set(places)
        for file, new in zip(files, places, strict=True):
            _put(file, new)
        for file in useless:
            file.unlink(missing_ok=True)


def _put(file: Path, place: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with contextlib.suppress(FileNotFoundError):
        file.chmod(stat.S_IMODE(place.stat().st_mode))
    os.replace(file, place)


def move_directory(folder: Path, place: Path) -> None:
    """Rename a `folder` to `place`, which is not there, or an empty directory."""
    if sys.platform == "win32" and place.exists():
        place.rmdir()
    os.rename(folder, place)


def _new_folder(place: Path) -> tuple[Path, int]:
    """A folder beside `place` that this process holds the lock of: its path, and the descriptor of the lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place.parent))
        try:
            lock = _descriptor(folder)
            with contextlib.suppress(OSError):  # then nobody can tell whether it is left behind, and it stays
                _locked(lock)
            (folder / _MARKER).write_text(place.name, encoding="utf-8", errors="surrogateescape")
            return folder, lock
        except FileNotFoundError:  # another process took it for one that was left behind, before it was locked
            continue


def _remove_dead(place: Path) -> set[str]:
    """Remove the folders in `place` that a process which is no more left behind; returns what living ones write."""
    busy: set[str] = set()
    for folder in place.iterdir() if place.is_dir() else ():
        if _FOLDER.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            with contextlib.suppress(OSError):  # of another user, or removed by another process
                lock = _descriptor(folder)
                try:
                    if not _locked(lock):
                        busy.add((folder / _MARKER).read_text(encoding="utf-8", errors="surrogateescape"))
                    elif (folder / _MARKER).is_file() or not any(folder.iterdir()):
                        _remove(folder)
                finally:
                    os.close(lock)
    return busy


def _remove(folder: Path) -> None:
    """Remove `folder`, its marker last: a process that is killed meanwhile leaves what can be told for its own."""
    shutil.rmtree(folder / _INSIDE, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _descriptor(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY) if sys.platform != "win32" else os.open(os.devnull, os.O_RDONLY)


def _locked(descriptor: int) -> bool:
    """Take the lock of a folder. False where another process has it; OSError on a disk that knows no locks."""
    if sys.platform == "win32":
        raise OSError(errno.ENOLCK, "directories have no locks")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for the lock of a directory, and hold it."""
    descriptor = _descriptor(folder)
    try:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # a disk without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
