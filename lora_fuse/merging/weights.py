"""Whole models by parameter name, read when asked for: state dicts, modules, and files of safetensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.files import refuse_pickle

WeightSource: TypeAlias = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Entry:
    """One tensor that can be read: on the CPU, maybe the caller's own memory, so not to be written to."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Weights(Mapping[str, Tensor]):
    """Parameter name -> tensor, read at every access and refused if it is not finite.

    Args:
        label: what errors call it, such as ``finetuned['sql']``.
        entries: by canonical name; of tensors that share memory only the first.
        aliases: other name -> canonical name.
        source: where it came from, for messages.
        names: all of them, in the order they came.
    """

    def __init__(
        self,
        label: str,
        entries: Mapping[str, Entry],
        aliases: Mapping[str, str],
        source: str,
        names: Sequence[str] | None = None,
    ) -> None:
        self.label, self.entries, self.aliases, self.source = label, entries, aliases, source
        self.names = [*entries, *aliases] if names is None else list(names)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.entries[name].read()
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"{self.label}: {name!r} has NaN or infinite entries")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def renamed(self, prefix: str) -> Weights:
        """The same tensors, ``prefix`` before each name."""
        aliases = {prefix + name: prefix + first for name, first in self.aliases.items()}
        entries = {prefix + name: entry for name, entry in self.entries.items()}
        return Weights(self.label, entries, aliases, self.source, [prefix + name for name in self.names])

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())


def open_weights(label: str, source: Any) -> Weights:
    """Names, shapes and dtypes of a model; tensors are read later, one at a time.

    Args:
        label: what errors call it.
        source: a state dict, a module, a folder of a model (``model.safetensors`` or shards with an index) or one
            safetensors file.
    Raises:
        TypeError: none of those, or a state dict with something else than tensors in it.
        ValueError: the files are missing, damaged, pickled or an adapter's; tensors overlap in memory without being
            the same, are on the meta device, or are of a floating-point dtype below 16 bits.
    """
    if isinstance(source, nn.Module):
        return _from_dict(label, source.state_dict(), f"<{type(source).__name__}>")
    if isinstance(source, Mapping):
        return _from_dict(label, source, "<memory>")
    if isinstance(source, (str, os.PathLike)):
        return _from_files(label, Path(source).expanduser())
    raise TypeError(
        f"{label}: expected a state dict, an nn.Module, or the path of a model folder or safetensors file, "
        f"got {type(source).__name__}"
    )


def _from_dict(label: str, state: Mapping[Any, Any], source: str) -> Weights:
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{label}: expected tensors by name, got {type(tensor).__name__} for {name!r}")
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(
                f"{label}: {name!r} is on the {tensor.device} device with layout {tensor.layout}; expected a dense "
                "tensor with data"
            )
        tensors[name] = tensor.detach()
    aliases = find_aliases(label, tensors)
    entries = {
        name: Entry(tuple(t.shape), t.dtype, lambda t=t: t.to("cpu"))  # type: ignore[misc]
        for name, t in tensors.items()
        if name not in aliases
    }
    return _checked(Weights(label, entries, aliases, source, list(tensors)))


def _from_files(label: str, path: Path) -> Weights:
    # These readers of headers rest on torch alone, although they live in a package above this one.
    from lora_fuse.checkpoints.header import read_header
    from lora_fuse.checkpoints.read import open_checkpoint, read_tensor

    refuse_pickle(path)
    if not path.exists():
        raise ValueError(f"{label}: {path}: no such file or folder (a model on the hub has to be downloaded first)")
    if path.is_dir() and (path / "adapter_config.json").exists():
        raise ValueError(f"{label}: {path} holds a LoRA adapter; expected a whole model")
    infos = read_header(path)[1] if path.is_file() else list(open_checkpoint(path).tensors.values())
    entries = {
        info.name: Entry(info.shape, info.torch_dtype, lambda info=info: read_tensor(info))  # type: ignore[misc]
        for info in infos
    }
    return _checked(Weights(label, entries, {}, str(path)))


def _checked(weights: Weights) -> Weights:
    if not weights.entries:
        raise ValueError(f"{weights.label}: holds no tensors")
    for name, entry in weights.entries.items():
        if entry.dtype.is_floating_point and entry.dtype not in _FLOATS:
            raise ValueError(
                f"{weights.label}: {name!r} is {entry.dtype}, expected one of {', '.join(map(str, _FLOATS))}; "
                "a quantised model has to be dequantised first"
            )
    return weights


def find_aliases(label: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Other name -> first name, where two names are the same memory read in the same way.

    Raises:
        ValueError: two tensors overlap in another way, such as a weight and its transpose.
    """
    first: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    ranges: list[tuple[str, int, int, str]] = []
    for name, t in tensors.items():
        if not t.numel():
            continue
        key = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride())
        if key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        span = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
        if span == t.numel():  # one run of memory; slices of a packed tensor interleave without overlapping
            ranges.append((str(t.device), t.data_ptr(), t.data_ptr() + t.nbytes, name))
    ranges.sort()
    for (device, _, end, name), (other_device, start, _, other) in pairwise(ranges):
        if device == other_device and start < end:
            raise ValueError(f"{label}: {name!r} and {other!r} overlap in memory without being the same tensor")
    return aliases
