"""Fuse adapters into a model folder, streaming: one block of rows of one tensor is in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.checkpoints.edits import Edit, NewValues, Unchanged
from lora_fuse.checkpoints.folder import out_dtype, with_dtype, write_folder
from lora_fuse.checkpoints.header import DTYPE_NAMES, FLOAT_DTYPES, TORCH_DTYPES, TensorInfo
from lora_fuse.checkpoints.plan import FusePlan, plan_fuse
from lora_fuse.checkpoints.read import Checkpoint, open_checkpoint, read_bytes
from lora_fuse.checkpoints.write import OutTensor, lay_out
from lora_fuse.merging.rounding import round_nearest, round_stochastic
from lora_fuse.merging.terms import SavePolicy, Weights


@dataclass(frozen=True)
class FuseReport:
    """What ``fuse_checkpoint`` did.

    Args:
        out: the folder written.
        files: weight files written.
        tensors: tensors written.
        changed: names of the tensors that an adapter changed, replaced or inserted.
        nbytes: bytes of tensors written.
        notes: what a user should know about the result.
    """

    out: Path
    files: tuple[str, ...]
    tensors: int
    changed: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...]


def fuse_checkpoint(
    base: str | os.PathLike[str],
    adapters: Sequence[LoraAdapter],
    weights: Weights = None,
    out: str | os.PathLike[str] = "fused",
    *,
    dtype: torch.dtype | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    max_shard_size: int | None = None,
    modules_to_save: SavePolicy = "refuse",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FuseReport:
    """Write a model folder whose weights are ``W + sum_i w_i * delta_i``, without loading the model.

    All adapters are accumulated in fp32 and rounded once. Tensors that no adapter touches are copied byte for byte
    (unless ``dtype`` asks for another dtype), config and tokenizer files are copied along. Beside the adapters, memory
    holds one block of rows of one tensor. ``out`` appears whole or not at all.

    A tied output head whose embedding changes (or the other way round) is written as a tensor of its own, with
    ``tie_word_embeddings`` set to false; a DoRA adapter is fused alone with weight 1; full copies (``modules_to_save``,
    absolute biases, trained token rows) replace what the base has.

    Args:
        base: a folder with ``model.safetensors`` or shards and their index.
        adapters: in memory; ``lf.load_adapter`` reads them. Every layer has to find its weight.
        weights: one per adapter; 1 each by default. One with weight 0 takes no part.
        out: the folder to write.
        dtype: of every floating-point tensor written; None keeps each tensor's own.
        rounding: ``nearest`` or ``stochastic`` (unbiased), for the tensors that change.
        seed: of stochastic rounding.
        max_shard_size: bytes per weight file; None keeps the base's files.
        modules_to_save: ``refuse``, ``first`` or ``average`` where several adapters carry a copy of one module.
        overwrite: replace a model's or an adapter's folder that exists at ``out``.
        progress: called with (bytes written, bytes in all).
    Returns:
        What was written.
    Raises:
        ValueError: anything about the base, the adapters or the arguments that does not fit, named; or a result that is
            not finite. Nothing is left at ``out``.
    """
    if dtype is not None and DTYPE_NAMES.get(dtype) not in FLOAT_DTYPES:
        raise ValueError(f"dtype: {dtype} given; accepted: float64, float32, float16, bfloat16 or None")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding: {rounding!r} given; accepted: 'nearest', 'stochastic'")
    if max_shard_size is not None and max_shard_size <= 0:
        raise ValueError(f"max_shard_size: {max_shard_size} given; it has to be positive")
    checkpoint = open_checkpoint(base)
    plan = plan_fuse(checkpoint, adapters, weights, modules_to_save)
    generator = torch.Generator().manual_seed(seed) if rounding == "stochastic" else None
    edits, files = _outputs(checkpoint, plan, dtype, max_shard_size)
    config = _new_config(checkpoint.config, plan, dtype) if plan.config or dtype is not None else None

    def pieces(tensor: OutTensor) -> Iterator[bytes | Tensor]:
        return _pieces(tensor, edits[tensor.name], generator)

    keep_index = checkpoint.index is not None and max_shard_size is None
    write_folder(checkpoint, files, pieces, config, keep_index, out, overwrite, [checkpoint.folder], progress)
    nbytes = sum(t.nbytes for tensors in files.values() for t in tensors)
    changed = tuple(name for name, edit in edits.items() if not isinstance(edit, Unchanged))
    return FuseReport(Path(out), tuple(files), len(edits), changed, nbytes, tuple(plan.notes))


def _outputs(
    checkpoint: Checkpoint, plan: FusePlan, dtype: torch.dtype | None, max_shard_size: int | None
) -> tuple[dict[str, Edit], dict[str, list[OutTensor]]]:
    """Every output tensor's edit, and the files they go to; inserted tensors join the last file."""
    edits: dict[str, Edit] = {}
    shards: dict[str, list[OutTensor]] = {}
    for file, tensors in checkpoint.shards.items():
        shards[file] = []
        for tensor in tensors:
            edit = plan.edits.get(tensor.name, Unchanged(tensor))
            code = out_dtype(tensor.dtype, dtype)
            name = plan.add_prefix + tensor.name
            edits[name] = edit
            if code == tensor.dtype and edit.shape == tensor.shape:
                shards[file].append(OutTensor(name, code, tensor.shape, tensor.nbytes))
            else:
                shards[file].append(OutTensor.of(name, code, edit.shape))
    last = list(shards)[-1]
    for name, edit in plan.edits.items():
        if name not in checkpoint.tensors:
            edits[name] = edit
            shards[last].append(OutTensor.of(name, out_dtype(_own_dtype(edit, checkpoint), dtype), edit.shape))
    return edits, lay_out(shards, checkpoint.stem, max_shard_size)


def _own_dtype(edit: Edit, checkpoint: Checkpoint) -> str:
    """The dtype of an inserted tensor: that of the base's it was made from, else the model's."""
    if isinstance(edit, NewValues):
        floating = edit.values.is_floating_point()
        return _main_dtype(checkpoint) if floating else DTYPE_NAMES[edit.values.dtype]
    source = getattr(edit, "source", None)
    return source.dtype if isinstance(source, TensorInfo) else _main_dtype(checkpoint)


def _main_dtype(checkpoint: Checkpoint) -> str:
    """The floating-point dtype that most of the model's bytes have."""
    counts: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in FLOAT_DTYPES:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.nbytes
    return max(counts, key=lambda code: counts[code], default="F32")


def _pieces(tensor: OutTensor, edit: Edit, generator: torch.Generator | None) -> Iterator[bytes | Tensor]:
    if isinstance(edit, Unchanged) and edit.source.dtype == tensor.dtype:
        yield from read_bytes(edit.source)
        return
    changed = not isinstance(edit, Unchanged)
    for tile in edit.tiles():
        target = TORCH_DTYPES[tensor.dtype]
        if changed and generator is not None:
            rounded = round_stochastic(tile, target, generator)
        else:
            rounded = round_nearest(tile, target)
        # an untouched tensor may hold infinities of its own; a cast must only not add any
        if not all_finite(rounded) and (changed or bool((torch.isinf(rounded) & torch.isfinite(tile)).any())):
            raise ValueError(
                f"{tensor.name}: the result is not finite in {tensor.dtype}: the base or an adapter holds NaN or "
                "infinite values, or values too large for that dtype"
            )
        yield rounded


def _new_config(config: Mapping[str, Any], plan: FusePlan, dtype: torch.dtype | None) -> dict[str, Any]:
    result = {**config, **plan.config}
    return result if dtype is None else with_dtype(result, dtype)
