"""Safetensors headers: what a file holds, checked against its size, without touching its data."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The dtypes that torch can hold; a tensor of any other dtype is still copied, byte for byte.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: ``nbytes`` bytes from byte ``offset`` of ``path`` on, row-major, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype.

        Raises:
            ValueError: torch has none for it.
        """
        if self.dtype not in TORCH_DTYPES:
            raise ValueError(f"{self.path}: tensor {self.name!r} has dtype {self.dtype}, which torch cannot read")
        return TORCH_DTYPES[self.dtype]


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, str], list[TensorInfo]]:
    """A safetensors file's metadata and its tensors in the order in which their data lies.

    Args:
        path: the file.
    Returns:
        ``(metadata, tensors)``.
    Raises:
        ValueError: the header is damaged, the file is shorter or longer than the header says, a tensor's bytes do not
            match its shape and dtype, or tensors overlap or leave holes.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path}: not a safetensors file, or cut short: no whole header in its {size} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        tensors = [_tensor_info(name, entry, path, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged safetensors header: {error}") from None
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise ValueError(f"{path}: damaged safetensors header: tensor {tensor.name!r} overlaps or leaves a hole")
        end += tensor.nbytes
    if end != size:
        state = "cut short" if size < end else "damaged"
        raise ValueError(f"{path}: {state}: its header describes {end} bytes, the file has {size}")
    return metadata, tensors


def _tensor_info(name: str, entry: dict[str, Any], path: Path, data_start: int) -> TensorInfo:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) or end < begin:
        raise ValueError(f"tensor {name!r} has shape {shape} and data_offsets {[begin, end]}")
    if dtype in TORCH_DTYPES and math.prod(shape) * TORCH_DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"tensor {name!r} is {dtype} {list(shape)} but has {end - begin} bytes")
    return TensorInfo(name, dtype, shape, path, data_start + begin, end - begin)
