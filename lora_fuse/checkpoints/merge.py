"""Merge model folders into one, a tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from lora_fuse.checkpoints.folder import out_dtype, with_dtype, write_folder
from lora_fuse.checkpoints.header import DTYPE_NAMES, FLOAT_DTYPES
from lora_fuse.checkpoints.output import check_output
from lora_fuse.checkpoints.plan import refuse_quantised
from lora_fuse.checkpoints.read import is_checkpoint, open_checkpoint, read_bytes, read_tensor
from lora_fuse.checkpoints.write import OutTensor, lay_out
from lora_fuse.merging.fit import Patterns
from lora_fuse.merging.full import open_merge
from lora_fuse.merging.options import Options
from lora_fuse.merging.terms import Weights

Folder: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True)
class MergeReport:
    """What ``merge_checkpoints`` did.

    Args:
        out: the folder written.
        files: weight files written.
        tensors: tensors written.
        merged: how many of them were merged; the others are the base's.
        nbytes: bytes of tensors written.
    """

    out: Path
    files: tuple[str, ...]
    tensors: int
    merged: int
    nbytes: int


@torch.no_grad()
def merge_checkpoints(
    base: Folder,
    models: Sequence[Folder] | Mapping[str, Folder],
    weights: Weights,
    out: Folder,
    *,
    method: str = "linear",
    options: Options | None = None,
    heads: Patterns = (),
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write the model folder that ``lf.merge(models, weights, method=method, base=base, ...)`` describes.

    The base's files give the layout; config and tokenizer files are copied from it. Memory holds one tensor of the base
    and of each model (with a "global" threshold: the base and one model while it is found). ``out`` appears whole or
    not at all.

    Args:
        base, models: model folders.
        weights, method, heads: as in ``merge``.
        out: the folder to write.
        options: ``merge``'s keywords.
        dtype: of every floating-point tensor written; None keeps each tensor's own.
        max_shard_size: bytes per weight file; None keeps the base's files.
        overwrite: replace a model's or an adapter's folder that exists at ``out``.
        progress: called with (bytes written, bytes in all).
    Returns:
        What was written.
    Raises:
        ValueError: as ``merge``; a folder that holds no model, or a quantised one. Nothing is left at ``out``.
    """
    if dtype is not None and DTYPE_NAMES.get(dtype) not in FLOAT_DTYPES:
        raise ValueError(f"dtype: {dtype} given; accepted: float64, float32, float16, bfloat16 or None")
    given = [Path(path) for path in (models.values() if isinstance(models, Mapping) else models)]
    check_output(out, overwrite, [Path(base), *given])
    for folder in (Path(base), *given):
        if folder.exists() and not is_checkpoint(folder):
            raise ValueError(f"{folder}: holds no model (a folder with safetensors weights); merging models needs some")
        refuse_quantised(open_checkpoint(folder))
    checkpoint = open_checkpoint(base)
    merged, _ = open_merge(models, weights, method, base, options or Options(), heads, dtype=dtype)

    shards = {
        name: [OutTensor.of(t.name, out_dtype(t.dtype, dtype), t.shape) for t in tensors]
        for name, tensors in checkpoint.shards.items()
    }
    files = lay_out(shards, checkpoint.stem, max_shard_size)

    def pieces(tensor: OutTensor) -> Iterator[bytes | Tensor]:
        source = checkpoint.tensors[tensor.name]
        if tensor.name in merged:
            yield merged[tensor.name]
        elif source.dtype == tensor.dtype:
            yield from read_bytes(source)
        else:
            yield read_tensor(source).to(dtype)

    config = None if dtype is None else with_dtype(checkpoint.config, dtype)
    keep_index = checkpoint.index is not None and max_shard_size is None
    write_folder(checkpoint, files, pieces, config, keep_index, out, overwrite, [Path(base), *given], progress)
    nbytes = sum(t.nbytes for tensors in files.values() for t in tensors)
    floating = sum(checkpoint.tensors[name].dtype in FLOAT_DTYPES for name in merged)
    return MergeReport(Path(out), tuple(files), len(checkpoint.tensors), floating, nbytes)
