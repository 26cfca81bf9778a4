"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

    from lora_fuse.adapters.lora import LoraAdapter

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
DTYPE = click.Choice(sorted(_DTYPES))
output = click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
overwrite_flag = click.option(
    "--overwrite", is_flag=True, help="Replace a model's or adapter's folder that exists there."
)
saved = click.option(
    "--modules-to-save",
    type=click.Choice(["refuse", "first", "average"]),
    default="refuse",
    show_default=True,
    help="Where several adapters bring a copy of one module (a head): which to take.",
)


def torch_dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, _DTYPES[name])


def adapter_names(adapters: Sequence[str]) -> list[str]:
    """What adapters are called that come by path or hub id: the last part, without a file's suffix."""
    return [Path(os.path.abspath(adapter)).name.removesuffix(".safetensors") for adapter in adapters]


def refuse_twice(names: Sequence[str], argument: str, reason: str) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{argument}: two are called {twice!r}, and {reason}")


def rank_text(adapter: LoraAdapter) -> str:
    ranks = sorted({layer.rank for layer in adapter.layers.values()})
    return "-" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
