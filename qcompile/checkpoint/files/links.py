"""Links in a directory that somebody else made: they may name any file of whoever reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qcompile.errors import CheckpointError, QCompileError


def leads_out(path: Path, directory: Path) -> bool:
    """Whether `path`, which is in `directory`, is in truth elsewhere, other than in the blobs of a cache of the hub.

    There `snapshots/<revision>/config.json` is a link to `blobs/<hash>` beside `snapshots`.
    """
    try:
        target, root = path.resolve(), directory.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return True
    return not any(target.is_relative_to(home) for home in (root, *_blobs(root)))


def _blobs(root: Path) -> Iterator[Path]:
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            yield folder.parent.with_name("blobs")


def check_inside(path: Path, directory: Path, error: type[QCompileError] = CheckpointError) -> None:
    """Raises `error` if `path` leads out of `directory`."""
    if leads_out(path, directory):
        raise error(f"{path} is a link that leads out of its directory: put the file itself there")
