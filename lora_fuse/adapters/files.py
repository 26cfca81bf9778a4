"""Bytes on disk: safetensors and JSON, with errors that name the file and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
DIFFUSERS_HEADER = "lora_adapter_metadata"  # the config, as JSON, in a diffusers file
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickle(path: Path) -> None:
    """Raise for a file of pickled weights.

    Raises:
        ValueError: the suffix is one that torch.save writes.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(
            f"{path}: pickled weights are not read, because unpickling can run any code; convert the file first, for "
            f"instance with safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), ...)"
        )


def read_safetensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, and the strings in its header.

    Args:
        path: the file.
        device: where the tensors go. They own their memory: the file may change afterwards.
    Returns:
        ``{key: tensor}`` and the header's ``__metadata__`` (empty if there is none).
    Raises:
        ValueError: not a file, pickled, empty, truncated, or damaged; the file and the reason are named.
    """
    refuse_pickle(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            # on the CPU get_tensor maps the file; a copy keeps the adapter independent of what happens to it
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a mapping)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({size} bytes){_guess(path)}: {error}") from error


def _guess(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return ", it is a Git LFS pointer: fetch the real file with `git lfs pull`"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return ", it looks like pickled weights under another name"
    return ", it is truncated or damaged"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: no such file, not UTF-8 JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write tensors, sorted by key; strided and aliased ones are copied, as the format has neither."""
    seen: set[int] = set()
    flat: dict[str, Tensor] = {}
    for key in sorted(tensors):
        t = tensors[key].detach().to("cpu").contiguous()
        storage = t.untyped_storage().data_ptr()
        flat[key] = t.clone() if storage in seen and t.numel() else t
        seen.add(storage)
    save_file(flat, path, metadata={"format": "pt", **(header or {})})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, its keys sorted; inner objects keep their order, which has a meaning in PEFT's patterns."""
    path.write_text(json.dumps(dict(sorted(value.items())), indent=2) + "\n", encoding="utf-8")
