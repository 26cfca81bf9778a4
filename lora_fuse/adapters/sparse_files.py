"""A ``SparseAdapter`` as two files: ``sparse_adapter.safetensors`` and ``sparse_adapter.json``; see docs/peru.md."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_fuse.adapters._atomic import atomic_directory
from lora_fuse.adapters.files import CONFIG_NAME, read_json, read_safetensors, write_json, write_safetensors
from lora_fuse.adapters.sparse_adapter import SparseAdapter, fingerprint
from lora_fuse.sparse import SparseMatrix

SPARSE_CONFIG, SPARSE_WEIGHTS = "sparse_adapter.json", "sparse_adapter.safetensors"
PERU_CONFIG = "peru.json"  # beside the folders of the tasks
_FORMAT, _VERSION = "lora_fuse.sparse_adapter", 1
_MATRIX, _DENSE, _HEAD = "matrix/", "dense/", "head/"


def save_sparse_adapter(adapter: SparseAdapter, directory: str | os.PathLike[str]) -> None:
    """Write the adapter's two files; both appear or neither.

    Args:
        adapter: what to write; bit for bit. ``source`` is not written.
        directory: created if need be. A sparse adapter already in it is replaced; other files stay.
    Raises:
        ValueError: ``directory`` is a file, or the adapter is not sound (``SparseAdapter.check``).
    """
    adapter.check()
    with atomic_directory(directory, last=SPARSE_CONFIG) as stage:
        write_sparse_adapter(adapter, stage)


def write_sparse_adapter(adapter: SparseAdapter, folder: Path) -> None:
    """Write the two files into a folder that nobody reads yet."""
    tensors: dict[str, Tensor] = {}
    matrices = {}
    for name, matrix in adapter.matrices.items():
        parts = {"values": matrix.values, "row_starts": matrix.row_starts}
        positions = "columns" if matrix.bitmap is None else "bitmap"
        parts[positions] = getattr(matrix, positions)
        tensors.update({f"{_MATRIX}{name}/{part}": t for part, t in parts.items()})
        matrices[name] = {
            "shape": list(adapter.shapes[name]),
            "kept": matrix.nnz,
            "positions": positions,
            "squares": list(adapter.squares.get(name, (0.0, 0.0))),
        }
    tensors.update({f"{_DENSE}{name}": t for name, t in adapter.dense.items()})
    tensors.update({f"{_HEAD}{name}": t for name, t in adapter.heads.items()})
    write_safetensors(folder / SPARSE_WEIGHTS, tensors)
    config = {
        "format": _FORMAT,
        "version": _VERSION,
        "density": adapter.density,
        "matrices": matrices,
        "dense": list(adapter.dense),
        "heads": list(adapter.heads),
        "merged": dict(adapter.fingerprint),
        "aliases": dict(adapter.aliases),
        "checksums": {key: fingerprint(t) for key, t in sorted(tensors.items())},
    }
    write_json(folder / SPARSE_CONFIG, config)


def sparse_folder(source: str | os.PathLike[str]) -> Path | None:
    """The folder to give to ``load_sparse_adapter``, or None: nothing there looks like a sparse adapter's.

    Args:
        source: a path, or a hub id.
    Raises:
        ValueError: a PERU of several tasks (their folders are named), or a folder that holds a LoRA too.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return None
    if any((folder / name).is_file() for name in (SPARSE_CONFIG, SPARSE_WEIGHTS)):
        if (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{folder}: holds both {SPARSE_CONFIG} and {CONFIG_NAME}; keep the two adapters apart")
        return folder
    tasks = sorted(path.parent.name for path in folder.glob(f"*/{SPARSE_CONFIG}"))
    if tasks or (folder / PERU_CONFIG).is_file():
        has = f"give the folder of one of its tasks: {_few(tasks)}" if tasks else "it has no tasks"
        raise ValueError(f"{folder}: holds a whole PERU, not one adapter; {has}")
    return None


def load_sparse_adapter(directory: str | os.PathLike[str]) -> SparseAdapter:
    """Read what ``save_sparse_adapter`` wrote, strictly.

    Args:
        directory: the folder with the two files.
    Returns:
        The adapter; ``source`` is the folder.
    Raises:
        ValueError: a file is missing, cut short or damaged; a tensor is missing, unknown or not what was written; a
            field is missing, unknown or of the wrong kind; NaN or infinite values; positions that do not agree. The
            file and the offender are named.
    """
    folder = Path(directory).expanduser()
    path = folder / SPARSE_CONFIG
    fields = {"density": (int, float), "matrices": dict, "dense": list, "heads": list, "merged": dict, "aliases": dict}
    config = read_fields(path, _FORMAT, _VERSION, {**fields, "checksums": dict})
    tensors, _ = read_safetensors(folder / SPARSE_WEIGHTS)
    check_tensors(folder / SPARSE_WEIGHTS, tensors, config["checksums"])
    matrices, shapes, squares = {}, {}, {}
    for name, info in config["matrices"].items():
        shape, square = _matrix_info(path, name, info)
        stem, positions = f"{_MATRIX}{name}/", info["positions"]
        parts = {part: _take(path, tensors, stem + part) for part in ("values", "row_starts", positions)}
        matrices[name] = SparseMatrix(
            parts["values"], parts["row_starts"], parts.get("columns"), parts.get("bitmap"), math.prod(shape[1:])
        )
        shapes[name], squares[name] = shape, square
    dense = {name: _take(path, tensors, f"{_DENSE}{name}") for name in config["dense"]}
    heads = {name: _take(path, tensors, f"{_HEAD}{name}") for name in config["heads"]}
    if tensors:
        raise ValueError(f"{folder / SPARSE_WEIGHTS}: unknown tensors {_few(tensors)}; {path.name} does not name them")
    for field in ("merged", "aliases"):
        if not all(isinstance(value, str) for value in config[field].values()):
            raise ValueError(f"{path}: damaged: {field!r} does not hold text only")
    density = float(config["density"])
    prints, aliases = config["merged"], config["aliases"]
    adapter = SparseAdapter(matrices, dense, heads, shapes, prints, density, str(folder), squares, aliases)
    adapter.check()
    for name, matrix in matrices.items():
        if matrix.nnz != config["matrices"][name]["kept"]:
            raise ValueError(f"{path}: {name!r} has {matrix.nnz} values, 'kept' says otherwise")
    return adapter


def read_fields(path: Path, what: str, version: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with exactly these fields, of these types, besides ``format`` and ``version``.

    Raises:
        ValueError: it is something else, or from a newer version.
    """
    config = read_json(path)
    if config.get("format") != what:
        raise ValueError(f"{path}: 'format' is {config.get('format')!r}, expected {what!r}")
    if config.get("version") != version:
        raise ValueError(f"{path}: version {config.get('version')!r} of the format; this release reads {version}")
    expected = {"format", "version", *fields}
    if missing := sorted(expected - config.keys()):
        raise ValueError(f"{path}: damaged: lacks {_few(missing)}")
    if unknown := sorted(config.keys() - expected):
        raise ValueError(f"{path}: unknown fields {_few(unknown)}")
    for name, kind in fields.items():
        if not isinstance(config[name], kind) or isinstance(config[name], bool):
            raise ValueError(f"{path}: {name!r} is damaged: got {type(config[name]).__name__}")
    return config


def check_tensors(path: Path, tensors: Mapping[str, Tensor], checksums: Mapping[str, Any]) -> None:
    """Refuse tensors other than those written.

    Raises:
        ValueError: naming those that are missing, unknown, or differ.
    """
    if missing := sorted(checksums.keys() - tensors.keys()):
        raise ValueError(f"{path}: lacks {_few(missing)}")
    if unknown := sorted(tensors.keys() - checksums.keys()):
        raise ValueError(f"{path}: unknown tensors {_few(unknown)}")
    if damaged := [key for key in sorted(tensors) if fingerprint(tensors[key]) != checksums[key]]:
        raise ValueError(f"{path}: damaged or changed: {_few(damaged)} do not match the checksums written with them")


def _take(path: Path, tensors: dict[str, Tensor], key: Any) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{path}: damaged: names {key!r}, which {SPARSE_WEIGHTS} lacks")
    return tensors.pop(key)


def _matrix_info(path: Path, name: str, info: Any) -> tuple[tuple[int, ...], tuple[float, float]]:
    try:
        shape, squares = info["shape"], info["squares"]
        sound = (
            info.keys() == {"shape", "kept", "positions", "squares"}
            and info["positions"] in ("columns", "bitmap")
            and len(shape) >= 2
            and all(type(size) is int and size > 0 for size in shape)
            and math.prod(shape) < 1 << 62
            and len(squares) == 2
            and all(type(value) in (int, float) for value in squares)
        )
    except (TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: damaged: {name!r} is described as {str(info)[:200]}")
    return tuple(shape), (float(squares[0]), float(squares[1]))


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
