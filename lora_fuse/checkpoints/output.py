"""An output folder that appears whole or not at all: written beside its place, synced, then renamed into it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


def check_output(out: str | os.PathLike[str], overwrite: bool = False, inputs: Sequence[Path] = ()) -> Path:
    """Refuse an output folder that cannot or must not be written, before any work is done for it.

    Args:
        out: the folder to be.
        overwrite: whether a model's, an adapter's, a PERU or a joint bank's folder that exists there may be replaced.
        inputs: files and folders that are read; ``out`` must not be, hold or lie in one of them.
    Returns:
        The absolute path.
    Raises:
        ValueError: ``out`` is a file, is not empty and ``overwrite`` is False, holds something else than models or
            adapters, or touches an input.
    """
    out = Path(out)
    place = out.resolve()
    for given in inputs:
        source = given.resolve()
        if place == source or place in source.parents or source in place.parents:
            raise ValueError(f"{out}: the output folder must lie apart from the input {given}")
    if out.is_symlink() or (place.exists() and not place.is_dir()):
        raise ValueError(f"{out}: exists and is not a folder")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise ValueError(
                f"{out}: the output folder exists and is not empty (overwrite=True, or --overwrite, replaces it)"
            )
        if not _replaceable(place):
            raise ValueError(f"{out}: holds other things than a model or adapters; it is not going to be replaced")
    return place


def _replaceable(folder: Path) -> bool:
    """Whether the folder is a model's or an adapter's, or holds nothing but adapters'.

    A slip of the path must not delete anything else, such as a training run's checkpoints beside its adapter.
    """
    here = Path.cwd().resolve()
    if folder == here or folder in here.parents:
        return False
    entries = list(folder.iterdir())
    if (folder / "peru.json").is_file():
        return _is_peru(entries)
    if (folder / "joint.json").is_file():
        return {entry.name for entry in entries} == {"joint.json", "joint.safetensors"}
    if all(entry.is_dir() and not entry.is_symlink() for entry in entries):
        return all((entry / "adapter_config.json").is_file() and _is_ours(entry) for entry in entries)
    return _is_ours(folder)


def _is_peru(entries: list[Path]) -> bool:
    """Whether these are a PERU's files and nothing else but its tasks' folders."""
    files = {entry.name for entry in entries if not entry.is_dir()}
    folders = [entry for entry in entries if entry.is_dir()]
    parts = {"sparse_adapter.json", "sparse_adapter.safetensors"}
    return files == {"peru.json", "merged.safetensors"} and all(
        not entry.is_symlink() and {part.name for part in entry.iterdir()} == parts for entry in folders
    )


def _is_ours(folder: Path) -> bool:
    config = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    known = {"additional_chat_templates", *extra_modules(folder)}
    others = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name not in known]
    return config and any(folder.glob("*.safetensors")) and not others


def extra_modules(folder: Path) -> list[str]:
    """Names of the folders of sentence-transformers' modules beside the transformer, from ``modules.json``."""
    listing = folder / "modules.json"
    if not listing.is_file():
        return []
    try:
        paths = [module.get("path") for module in json.loads(listing.read_text(encoding="utf-8"))]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{listing}: damaged: {error}") from None
    return [path for path in paths if isinstance(path, str) and path and Path(path).name == path]


@contextmanager
def staged_folder(out: str | os.PathLike[str], overwrite: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``out`` when the block ends well and vanishes when it does not.

    Args:
        out, overwrite, inputs: as in ``check_output``.
    Returns:
        The folder to write into, on the same file system as ``out``.
    Raises:
        ValueError: as in ``check_output``.
    """
    place = check_output(out, overwrite, inputs)
    place.parent.mkdir(parents=True, exist_ok=True)
    stage = _new_folder(place, "partial")
    try:
        yield stage
        for file in stage.rglob("*"):
            _sync(file)
        _sync(stage)
        _move_into_place(stage, place)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _new_folder(beside: Path, suffix: str) -> Path:
    folder = beside.parent / f".{beside.name}.{uuid.uuid4().hex[:8]}.{suffix}"
    folder.mkdir()  # not tempfile.mkdtemp, which would make the result private to this user
    return folder


def _move_into_place(stage: Path, place: Path) -> None:
    if place.is_dir() and any(place.iterdir()):
        old = _new_folder(place, "old")
        place.rename(old / "replaced")
        try:
            stage.rename(place)
        except BaseException:
            (old / "replaced").rename(place)
            old.rmdir()
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        stage.rename(place)
    _sync(place.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems refuse it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
