"""A model folder's plan, from its index and safetensors headers, and its tensors one by one or a few rows at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fuse.checkpoints.header import TORCH_DTYPES, TensorInfo, read_header

_INDEX_SUFFIX = ".safetensors.index.json"
# In this order where a folder holds several: what transformers and diffusers load by default.
_STEMS = ("model", "diffusion_pytorch_model")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A model folder as its headers describe it; no tensor data is held.

    Args:
        folder: the folder.
        stem: what its weight files' names start with, such as ``model``.
        shards: weight file name -> its tensors, in the order of their data.
        metadata: weight file name -> the file's safetensors metadata.
        index: the index JSON's own ``metadata``, or None where there is a single weight file.
        config: ``config.json``, or empty.
    """

    folder: Path
    stem: str
    shards: Mapping[str, tuple[TensorInfo, ...]]
    metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", {t.name: t for shard in self.shards.values() for t in shard})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def num_parameters(self) -> int:
        """Number of scalars in all tensors."""
        return sum(math.prod(t.shape) for t in self.tensors.values())

    def module_paths(self) -> list[str]:
        """Paths of the modules that own a ``weight``, in the order of the files."""
        return [name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")]

    def skeleton(self) -> nn.Module:
        """Nested empty modules with the checkpoint's weights on the meta device: paths and shapes, no memory.

        What readers need that have to look names up in a model (kohya's files).
        """
        root = nn.Module()
        for path in self.module_paths():
            info, module = self.tensors[f"{path}.weight"], root
            for part in path.split("."):
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            dtype = TORCH_DTYPES.get(info.dtype, torch.uint8)
            module.register_buffer("weight", torch.empty(info.shape, dtype=dtype, device="meta"))
        return root


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder holds model weights (an adapter's folder does not)."""
    folder = Path(folder)
    return folder.is_dir() and not (folder / "adapter_config.json").exists() and bool(_weight_files(folder))


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read the index and the headers of a model folder: ``model.safetensors``, or shards with an index JSON.

    Args:
        folder: a folder as ``save_pretrained`` writes it.
    Returns:
        The plan; only headers were read.
    Raises:
        ValueError: no such folder, no safetensors weights in it, several without an index, a damaged index or header, a
            shard that the index names and the folder lacks, a tensor that its shard lacks or that lies in two shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder (a model on the hub has to be downloaded first)")
    config = _read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    files = _weight_files(folder)
    if not files:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
        advice = f"; pickled weights such as {pickled[0]} are refused: convert them to safetensors" if pickled else ""
        raise ValueError(f"{folder}: no model weights (*.safetensors) in this folder{advice}")
    if len(files) > 1:
        raise ValueError(
            f"{folder}: several weight files and no index that says how they belong together: "
            f"{', '.join(p.name for p in files[:10])}"
        )
    if not files[0].name.endswith(_INDEX_SUFFIX):
        metadata, tensors = read_header(files[0])
        name = files[0].name
        return Checkpoint(folder, files[0].stem, {name: tuple(tensors)}, {name: metadata}, None, config)
    return _open_sharded(folder, files[0], config)


def _weight_files(folder: Path) -> list[Path]:
    """The index or the weight file that a loader would take; several only where none is the obvious one."""
    for stem in _STEMS:
        for name in (f"{stem}.safetensors", f"{stem}{_INDEX_SUFFIX}"):
            if (folder / name).is_file():
                return [folder / name]
    indexes = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    return indexes or sorted(folder.glob("*.safetensors"))


def _open_sharded(folder: Path, index_path: Path, config: Mapping[str, Any]) -> Checkpoint:
    index = _read_json(index_path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_path}: damaged index: no 'weight_map' from tensor names to files")
    names = sorted({str(name) for name in weight_map.values()})
    if foreign := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{index_path}: damaged index: {foreign[0]!r} is not a file name in this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: {index_path.name} names {_some(missing)}, which the folder lacks")
    shards: dict[str, tuple[TensorInfo, ...]] = {}
    metadata: dict[str, dict[str, str]] = {}
    owner: dict[str, str] = {}
    for name in names:
        metadata[name], tensors = read_header(folder / name)
        for tensor in tensors:
            if tensor.name in owner:
                raise ValueError(f"{folder}: tensor {tensor.name!r} lies in both {owner[tensor.name]} and {name}")
            owner[tensor.name] = name
        shards[name] = tuple(tensors)
    if lost := [tensor for tensor, name in weight_map.items() if owner.get(tensor) != name]:
        raise ValueError(f"{folder}: {index_path.name} promises {_some(lost)}, which its file lacks")
    stem = index_path.name.removesuffix(_INDEX_SUFFIX)
    return Checkpoint(folder, stem, shards, metadata, index.get("metadata") or {}, config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(map(repr, names[:10])) + rest


def read_bytes(tensor: TensorInfo, chunk: int = 1 << 22) -> Iterator[bytes]:
    """The tensor's bytes, in pieces of at most ``chunk``."""
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            piece = file.read(min(chunk, left))
            if not piece:
                raise ValueError(f"{tensor.path}: cut short while it was read")
            left -= len(piece)
            yield piece


def read_tiles(tensor: TensorInfo, max_bytes: int = 1 << 22) -> Iterator[tuple[int, Tensor]]:
    """The tensor as blocks of whole rows of at most ``max_bytes`` each (one row at least).

    Returns:
        Pairs of the first row's number and the block, a tensor of its own in the file's dtype. A scalar is one block
        of shape ``[]``; an empty tensor is one empty block.
    Raises:
        ValueError: the file was cut short, or torch has no such dtype.
    """
    dtype = tensor.torch_dtype
    if not tensor.nbytes or not tensor.shape:
        block = torch.empty(tensor.shape, dtype=dtype)
        if tensor.nbytes:
            block = torch.frombuffer(bytearray(b"".join(read_bytes(tensor))), dtype=dtype).reshape(tensor.shape)
        yield 0, block
        return
    rows, row_bytes = tensor.shape[0], tensor.nbytes // tensor.shape[0]
    step = max(1, max_bytes // row_bytes)
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            data = bytearray((stop - start) * row_bytes)
            view, filled = memoryview(data), 0
            while filled < len(data):
                count = file.readinto(view[filled:])
                if not count:
                    raise ValueError(f"{tensor.path}: cut short while it was read")
                filled += count
            yield start, torch.frombuffer(data, dtype=dtype).reshape(stop - start, *tensor.shape[1:])


def read_tensor(tensor: TensorInfo) -> Tensor:
    """The whole tensor, in the file's dtype."""
    (_, block), *_ = read_tiles(tensor, max(tensor.nbytes, 1))
    return block
