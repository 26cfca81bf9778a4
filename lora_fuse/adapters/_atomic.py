"""Output that appears whole or not at all: write beside, fsync, rename."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    with suppress(OSError):  # some network file systems refuse it; the rename has happened all the same
        _sync(path)


@contextmanager
def atomic_directory(directory: str | os.PathLike[str], *, last: str) -> Iterator[Path]:
    """Fill a directory so that it never holds a mixture of old and new files.

    The body writes into the temporary directory it is given. If it raises, nothing has changed. A directory that did
    not exist appears by one rename. In one that did, files of the same names are replaced and all others stay;
    ``last`` is removed first and put in place last, so that a process killed in between leaves a directory that lacks
    ``last`` rather than one whose files do not belong together.

    Args:
        directory: where the files belong; missing parents are created.
        last: name of the file without which a reader will not accept the directory, such as a config or an index.
    Yields:
        A directory on the same file system, to write into.
    Raises:
        ValueError: ``directory`` is a file.
        OSError: from the file system.
    """
    target = Path(os.path.realpath(directory))
    if target.exists() and not target.is_dir():
        raise ValueError(f"directory: {target} is a file, expected a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    home = target if target.exists() else target.parent  # inside an existing one: it may be a mount point
    stage = home / f".{target.name}.tmp-{secrets.token_hex(4)}"
    stage.mkdir()
    try:
        yield stage
        files = sorted(p for p in stage.rglob("*") if p.is_file())
        for path in files:
            _sync(path)
        for path in {p.parent for p in files}:
            _sync_directory(path)
        if not _appear(stage, target):
            (target / last).unlink(missing_ok=True)
            for path in sorted(files, key=lambda p: p.relative_to(stage) == Path(last)):
                place = target / path.relative_to(stage)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, place)
            _sync_directory(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    _sync_directory(target.parent)


def _appear(stage: Path, target: Path) -> bool:
    """Rename ``stage`` to ``target`` if there is no such directory yet."""
    if target.exists():
        return False
    try:
        os.rename(stage, target)
    except OSError:
        if target.is_dir():  # another writer was first
            return False
        raise
    return True
