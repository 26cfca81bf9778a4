"""A model folder written from another one: new weights, tensor by tensor, and everything else copied along."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_fuse.checkpoints.header import DTYPE_NAMES, FLOAT_DTYPES
from lora_fuse.checkpoints.output import extra_modules, staged_folder
from lora_fuse.checkpoints.read import Checkpoint
from lora_fuse.checkpoints.write import OutTensor, ShardWriter, write_index, write_json

# Weights in other formats would be stale beside the new ones, and training states do not belong to the result.
_NOT_COPIED = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".pkl", ".h5",
    ".msgpack", ".gguf", ".onnx", ".onnx_data", ".tflite", ".ot", ".lock", ".incomplete",
)  # fmt: skip


def write_folder(
    base: Checkpoint,
    files: Mapping[str, Sequence[OutTensor]],
    pieces: Callable[[OutTensor], Iterable[bytes | Tensor]],
    config: Mapping[str, Any] | None,
    keep_index: bool,
    out: str | os.PathLike[str],
    overwrite: bool,
    inputs: Sequence[Path],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write a model folder; it appears whole or not at all.

    Args:
        base: where config, tokenizer and other files come from.
        files: file name -> its tensors, as ``lay_out`` gives them.
        pieces: a tensor's bytes, or its values in its dtype, in order.
        config: ``config.json``, or None for the base's.
        keep_index: whether a single file gets an index too.
        out, overwrite, inputs: as in ``check_output``.
        progress: called with (bytes written, bytes in all).
    Raises:
        ValueError: as ``check_output``; the file system lacks the room.
    """
    total = sum(t.nbytes for tensors in files.values() for t in tensors)
    with staged_folder(out, overwrite, inputs) as stage:
        free = shutil.disk_usage(stage).free
        if free < total:
            raise ValueError(f"{out}: {total} bytes are to be written, the file system has {free} left")
        done = 0
        for name, tensors in files.items():
            metadata = base.metadata.get(name) or next(iter(base.metadata.values()))
            writer = ShardWriter(stage / name, tensors, metadata)
            try:
                for tensor in tensors:
                    for count in writer.write(tensor, pieces(tensor)):
                        done += count
                        if progress is not None:
                            progress(done, total)
            finally:
                writer.close()
        _copy_companions(base.folder, stage)
        if config is not None:
            write_json(stage / "config.json", config)
        if len(files) > 1 or keep_index:
            write_index(stage, base.stem, files, base.index or {})


def out_dtype(code: str, dtype: torch.dtype | None) -> str:
    """The dtype to write a tensor in that is stored as ``code``: ``dtype`` goes for floating-point ones."""
    return DTYPE_NAMES[dtype] if dtype is not None and code in FLOAT_DTYPES else code


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config of a model whose floating-point tensors all have that dtype."""
    result = dict(config)
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in result] or ["torch_dtype"]
    result.update(dict.fromkeys(keys, name))
    if isinstance(result.get("text_config"), dict):
        nested = result["text_config"]
        result["text_config"] = {**nested, **{k: name for k in ("dtype", "torch_dtype") if k in nested}}
    return result


def _copy_companions(base: Path, stage: Path) -> None:
    """Config, tokenizer, code and text files, and the folders of sentence-transformers' further modules, whole."""
    for source in sorted(base.iterdir()):
        if source.is_file() and not source.name.startswith(".") and not source.name.endswith(_NOT_COPIED):
            shutil.copyfile(source, stage / source.name)
    for path in (*extra_modules(base), "additional_chat_templates"):
        if (base / path).is_dir():
            shutil.copytree(base / path, stage / path, dirs_exist_ok=True)
