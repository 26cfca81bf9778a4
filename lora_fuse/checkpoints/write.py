"""New safetensors shards, written front to back from a header that is known beforehand, and the index last."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_fuse.checkpoints.header import TORCH_DTYPES


@dataclass(frozen=True)
class OutTensor:
    """One tensor to write: its name, safetensors dtype, shape, and bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, dtype: str, shape: Sequence[int]) -> OutTensor:
        return cls(name, dtype, tuple(shape), math.prod(shape) * TORCH_DTYPES[dtype].itemsize)


def lay_out(
    shards: Mapping[str, Sequence[OutTensor]], stem: str, max_shard_size: int | None
) -> dict[str, list[OutTensor]]:
    """Decide which tensor goes to which file: as given, or packed anew, in order, into files of ``max_shard_size``.

    Args:
        shards: file name -> tensors, the layout to keep.
        stem: what new file names start with.
        max_shard_size: bytes of tensors in a file at most; a larger tensor gets its own file. None keeps the layout.
    Returns:
        File name -> tensors, larger dtypes first, so that every tensor is aligned to its own size.
    """
    if max_shard_size is None:
        packed = [list(tensors) for tensors in shards.values()]
        names = list(shards)
    else:
        packed, room = [], 0
        for tensor in (t for tensors in shards.values() for t in tensors):
            if not packed or tensor.nbytes > room:
                packed.append([])
                room = max_shard_size
            packed[-1].append(tensor)
            room -= tensor.nbytes
        count = len(packed)
        names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = [f"{stem}.safetensors"]
    return {
        name: sorted(tensors, key=lambda t: -TORCH_DTYPES[t.dtype].itemsize if t.dtype in TORCH_DTYPES else 0)
        for name, tensors in zip(names, packed, strict=True)
    }


class ShardWriter:
    """Writes one safetensors file tensor by tensor; nothing is held.

    Args:
        path: the file to create.
        tensors: what is going to be written, in this order.
        metadata: the file's ``__metadata__``.
    """

    def __init__(self, path: Path, tensors: Sequence[OutTensor], metadata: Mapping[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [end, end + tensor.nbytes],
            }
            end += tensor.nbytes
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)  # the data starts at a multiple of 8
        self._file = path.open("wb")
        self._file.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, tensor: OutTensor, pieces: Iterable[bytes | Tensor]) -> Iterator[int]:
        """Write one tensor from its pieces in order, and yield each piece's bytes once it is written.

        Raises:
            RuntimeError: the pieces' bytes are not the tensor's (an error in the caller; nothing of the file is kept).
        """
        written = 0
        for piece in pieces:
            count = self._file.write(piece if isinstance(piece, bytes) else tensor_bytes(piece))
            written += count
            yield count
        if written != tensor.nbytes:
            raise RuntimeError(f"tensor {tensor.name!r}: {written} bytes for {tensor.nbytes}")

    def close(self, sync: bool = True) -> None:
        if sync:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_index(
    folder: Path, stem: str, files: Mapping[str, Sequence[OutTensor]], metadata: Mapping[str, object]
) -> None:
    """Write ``<stem>.safetensors.index.json``; ``total_size`` and ``total_parameters`` are made anew."""
    tensors = [t for shard in files.values() for t in shard]
    totals: dict[str, object] = {"total_size": sum(t.nbytes for t in tensors)}
    if "total_parameters" in metadata:
        totals["total_parameters"] = sum(math.prod(t.shape) for t in tensors)
    index = {
        "metadata": {**metadata, **totals},
        "weight_map": {t.name: name for name, shard in sorted(files.items()) for t in shard},
    }
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, value: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
